"""Turns users' mistakes, and failures of disks, stores and memory, into errors of one line."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import Any

# Exit code when a process or a device is lost, or a store or the Hub does not answer: run again.
LOST = 69
INTERRUPTED = 130  # exit code after Ctrl-C, as shells expect


class UserError(ValueError):
    """Reports a user's mistake: the field or file, the value found, the value expected.

    Characters that cannot be printed, for example in names from damaged files, are escaped, so that
    the message stays one line.
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


class Outage(OSError):
    """Reports a store, or the Hub, that does not answer, as (errno, text, filename).

    It may answer later; nothing is damaged.
    """


@contextlib.contextmanager
def extra(name: str, more: str = "") -> Iterator[None]:
    """Turns a missing package into a UserError. The message names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f"install it with ./launch/setup.sh {name}{more}"
        raise UserError(f"{error.name} is not installed: {remedy}") from None


# TPUs use the words after the bar.
NO_MEMORY = re.compile("out of memory|attempting to (allocate|reserve)", re.IGNORECASE)


def no_memory(error: BaseException) -> str:
    """Returns one line on the memory that a device lacked; "" for any other error."""
    text = str(error)
    is_of_jax = isinstance(error, RuntimeError | ValueError)
    if not is_of_jax or not NO_MEMORY.search(text):
        return ""
    size = re.search(r"allocat\w* (\d+) bytes", text)
    if size is None:
        return "out of device memory"
    return f"out of device memory: {int(size[1]) / 2**30:,.1f} GiB requested at once"


# jax's words for a device, or its runtime, that has failed. Another start may succeed.
DEVICE_LOST = re.compile(
    "(UNAVAILABLE|ABORTED|DATA_LOSS|DEADLINE_EXCEEDED): "
    "|.*(halted|resource busy|ECC_UNCORRECTABLE|NCCL operation)",
    re.IGNORECASE | re.DOTALL,
)


def device_lost(error: BaseException) -> bool:
    """Tells whether a device has failed by itself, not because of the program or its user."""
    return isinstance(error, RuntimeError) and bool(DEVICE_LOST.match(str(error)))


# Words near the start of an error that mean: the store does not answer, or it denies access.
NO_ANSWER = re.compile(
    "unavailable|deadline|exhausted|aborted|cancelled|timeout|timed out|connection|transport"
    "|gateway|internal ?server|too ?many ?requests"
    "|client(connector|os|payload)|disconnected|proxyerror"  # of gcsfs, by their names
    "|(connect|read|write|remoteprotocol)error",  # of the Hub's client
    re.IGNORECASE,
)
DENIED = re.compile("denied|forbidden|unauth|credential", re.IGNORECASE)
# HTTP statuses with the same meanings, in exceptions of gcsfs.
NO_ANSWER_STATUS = ("408", "429", "500", "502", "503", "504")
DENIED_STATUS = ("401", "403")


def store_error(error: BaseException, path: Any) -> OSError | None:
    """Returns the OSError for a failure of the disk or store of `path`; None for another error.

    It is an Outage where a store does not answer. Clients of stores raise exceptions of any kind;
    tensorstore, for example, a ValueError with the error code in its text.
    """
    if isinstance(error, UserError) or no_memory(error):
        return None
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return error  # whatever words are in its path
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code and not isinstance(error, OSError):
        error = OSError(int(code[1]), os.strerror(int(code[1])), str(path))
    text = f"{type(error).__name__} {reason(error)}"[:60]
    status = str(getattr(error, "code", ""))
    # "libcurl code": TensorFlow's words for a host that is not found
    silent = NO_ANSWER.search(text) or "libcurl code" in reason(error)
    if silent or status in NO_ANSWER_STATUS:
        return Outage(errno.ECONNABORTED, reason(error), str(path))
    denied = DENIED.search(text) or status in DENIED_STATUS
    if not isinstance(error, OSError) and denied:
        return OSError(errno.EACCES, reason(error), str(path))
    return error if isinstance(error, OSError) else None


@contextlib.contextmanager
def store_errors(path: Any) -> Iterator[None]:
    """Raises OSError where a store's client fails inside; an Outage if the store does not answer.

    Other exceptions pass unchanged.
    """
    try:
        yield
    except Exception as error:  # a store's client raises exceptions of any kind
        raise store_error(error, path) or error from None


def reason(error: BaseException) -> str:
    """Returns the cause of an error as one line, without tensorstore's own details."""
    if isinstance(error, UserError):
        return str(error)
    notes = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    while error.__cause__ is not None:
        error = error.__cause__
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = str(error.strerror)
    text = " ".join(text.split())
    text = re.sub(r'Error opening "\w+" driver: | \[(tensorstore|source|os_error).*', "", text)
    return notes + kind + text[:400]
