"""Trains and runs coprocessors that extend the cache of a frozen decoder (Liu et al. 2025)."""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from latent_delib.errors import UserError

if TYPE_CHECKING:
    from latent_delib import mesh
    from latent_delib.lm import look
    from latent_delib.lm.load import (
        Coprocessor,
        Decoder,
        init_coprocessor,
        load_coprocessor,
        load_decoder,
    )
    from latent_delib.lm.model import AugmentedLM

__version__ = "0.2.0"
__all__ = [
    "AugmentedLM",
    "Coprocessor",
    "Decoder",
    "UserError",
    "init_coprocessor",
    "load_coprocessor",
    "load_decoder",
    "look",
    "mesh",
]
MODULES = {"look": "latent_delib.lm.look", "mesh": "latent_delib.mesh"}


def _prepare_command() -> None:
    """Sets up the process of a command, before any other import.

    Ctrl-C ends the imports at once, without a message; `commands.run` handles it later. glibc gets
    huge pages: each step allocates and frees arrays, the kernel clears each of their pages, and
    with pages of 4 KiB this takes a quarter of a CPU's time. glibc reads the size only when a
    process starts, so the process starts again once.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


# `python -m latent_delib.COMMAND`
if sys.argv[:1] == ["-m"] and any(word.startswith("latent_delib") for word in sys.orig_argv):
    _prepare_command()


def __getattr__(name: str) -> Any:
    """Returns a part of the interface, imported at first use, because `data` alone needs no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in MODULES:
        return importlib.import_module(MODULES[name])
    module = "latent_delib.lm.model" if name == "AugmentedLM" else "latent_delib.lm.load"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    """Returns the interface alone."""
    return sorted(__all__)
