"""Runs every command; ends it with an exit code, and one clear line where it cannot go on."""

import errno
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from absl import flags

from latent_delib.errors import INTERRUPTED, LOST, Outage, UserError, device_lost, no_memory
from latent_delib.machine import files
from latent_delib.machine.command_line import WRITTEN, help_text, parse
from latent_delib.machine.config_keys import list_keys

STOPPED = 75  # the exit code after SIGTERM, once all is saved: run it again to go on
UNREAD = 128 + signal.SIGPIPE  # the exit code once nobody reads the output, as after `| head`
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EPIPE)
# Messages of Orbax and asyncio that tell nothing new, because a failed save raises its error as
# well; and seqio's warning of a source that it does not keep on disk.
NOISE = re.compile(
    r"Requested `tracked_metric`|run\(\) raised an exception|Handler Commit operations"
    "|Save Finalize thread|Event loop is closed|Task was destroyed but it is pending"
    "|exception was never retrieved|uncached FunctionDataset"
)


def run(main: Callable[[Any], None], doc: str, **options: tuple[Any, str]) -> None:
    """Parses the command line, calls `main(values)` and exits.

    The exit code is 0 when done, 1 for a user's mistake or a failed disk, LOST for a device that
    failed and for a store or a Hub that does not answer, INTERRUPTED for Ctrl-C, UNREAD for a
    closed pipe, or the code with which `main` exits itself, such as STOPPED.

    Args:
      main: a function that gets the values of the flags as attributes.
      doc: the text that --help prints first.
      options: flag -> (default, help), as in `command_line.Flags`.
    """
    _settle()
    values = flags.FlagValues()
    try:
        words = set(sys.argv[1:])
        if {"--help", "-h", "--helpfull"} & words:
            print(help_text(doc, options))
        elif "--list_keys" in words and "config" in options:
            print(list_keys(options))
        else:
            parse(values, options)
            main(values)
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Outage as error:
        print(f"error: {error.filename}: {error.strerror}; run again to go on", file=sys.stderr)
        sys.exit(LOST)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            sys.stdout = None  # or Python, as it ends, writes again, and reports the failure
            sys.exit(UNREAD)
        sys.exit(f"error: {_disk_message(error, values)}")
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except Exception as error:
        line = _device_message(error)
        if not line:
            raise
        if device_lost(error):
            print(f"error: {line}", file=sys.stderr)
            sys.exit(LOST)
        sys.exit(f"error: {line}")


def leave(code: int) -> None:
    """Ends the process without jax's clean-up, which may crash after an interrupted compile."""
    with suppress(AttributeError, OSError):  # a closed pipe, or no output at all
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _settle() -> None:
    """Sets up the process so that an error is its last line."""
    # Until here Ctrl-C ends the process: see __init__.py.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # text that the terminal cannot show
    logging.basicConfig()  # a handler, where no library has made one
    for handler in logging.root.handlers:
        handler.addFilter(lambda record: not NOISE.search(str(record.msg)))
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # of a failed save
    sys.unraisablehook = _unraisable
    flags.FLAGS(sys.argv[:1])  # seqio reads absl's own flags and wants them parsed


def _unraisable(lost: Any) -> None:
    """Raises Ctrl-C again where Python drops it, as in a callback while a library is imported."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        # From a thread, or it would be dropped again.
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    elif not NOISE.search(str(lost.exc_value)):
        sys.__unraisablehook__(lost)


def _is_unread() -> bool:
    """Tells whether standard output is a pipe whose reader has gone."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _disk_message(error: OSError, values: flags.FlagValues) -> str:
    """Returns one line on a disk or a network that failed."""
    text = " ".join(str(error.strerror or error).split())
    if error.filename:
        path = Path(os.fsdecode(error.filename))
        if error.errno in (errno.ENOTDIR, errno.EEXIST) and files.in_the_way(path):
            return f"{files.in_the_way(path)}: {files.NOT_A_FOLDER}"
        if error.errno == errno.EISDIR:
            return f"{path}: is a folder, expected a file"
        return f"{error.filename}: {text}"
    if error.errno not in UNWRITTEN:
        return text
    written = []
    for name in WRITTEN:
        if name in values and values[name].value:
            written.append(f"--{name}={values[name].value}")
    return f"{text}, writing to {' or '.join([*written, 'standard output'])}"


def _device_message(error: Exception) -> str:
    """Returns one line on a lack of memory, a failed or a missing device; "" for other errors."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text or 'none is left'}"
    line = no_memory(error)
    if line:
        return (
            f"{line}; take fewer rows at once (training: lower config.train.batch_size, or raise "
            "config.train.accumulation; evaluation, and questions in training: "
            "config.evaluate.batch_size or positions; others: --batch_size), keep less "
            "(config.compute.remat=full), train less (config.method.lora_rank, "
            "config.optimizer.name=adafactor), or take more devices (config.mesh, --tensor)"
        )
    if device_lost(error):
        return f"a device failed: {text[:400]}; run again to resume"
    frames = traceback.extract_tb(error.__traceback__)
    if "xla_bridge" not in frames[-1].filename:
        return ""
    wanted = os.environ.get("JAX_PLATFORMS", "(unset)")
    why = text.partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    why = why or "JAX finds no such platform here"
    return f"JAX_PLATFORMS={wanted}: {why}; unset it, or install what it needs (launch/setup.sh)"
