"""Runs a command in this process as `python -m` does, flags and all."""

import importlib.util
import runpy
import sys

import pytest


def run_command(name: str, *words: str, **flags) -> str:
    """Returns the line that the command ends with where it cannot go on; "" where it is done."""
    source = importlib.util.find_spec(f"latent_delib.{name}").origin
    given = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words, *given])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a command sets it
        try:
            runpy.run_path(source, run_name="__main__")
        except SystemExit as exit_:
            return str(exit_.code)
    return ""
