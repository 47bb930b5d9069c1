"""Lists the commands; `latent-delib train ...` is short for `python -m latent_delib.train ...`."""

import ast
import os
import sys
from pathlib import Path

from latent_delib.machine import commands


def main(values: object) -> None:
    del values
    print("The commands, each with --help; `latent-delib COMMAND` is the same:\n")
    for name, doc in docs_by_command().items():
        print(f"  python -m latent_delib.{name:13} {doc.splitlines()[0]}")


def docs_by_command() -> dict[str, str]:
    """Returns each command's name and docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text()
        if "    commands.run(" in source:
            found[path.stem] = ast.get_docstring(ast.parse(source))
    return found


def entry() -> None:
    word, *others = sys.argv[1:] or [""]
    if word in docs_by_command():
        os.execv(sys.executable, [sys.executable, "-m", f"latent_delib.{word}", *others])
    if word and not word.startswith("-"):
        sys.exit(f"error: {word}: no such command; there are {', '.join(docs_by_command())}")
    commands.run(main, __doc__)


if __name__ == "__main__":
    entry()
