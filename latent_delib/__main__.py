"""Lists the commands; `latent-delib train ...` is short for `python -m latent_delib.train ...`."""

import ast
import os
import sys
from pathlib import Path

from latent_delib.machine import commands


def main(values: object) -> None:
    del values
    print("The commands, each with --help; `latent-delib COMMAND` is the same:\n")
    for name, doc in there().items():
        print(f"  python -m latent_delib.{name:13} {doc.splitlines()[0]}")


def there() -> dict[str, str]:
    """Returns each command's name and docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        source = path.read_text()
        if "    commands.run(" in source:
            found[path.stem] = ast.get_docstring(ast.parse(source))
    return found


def entry() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in there():
        command = [sys.executable, "-m", f"latent_delib.{sys.argv[1]}", *sys.argv[2:]]
        os.execv(sys.executable, command)
    commands.run(main, __doc__)


if __name__ == "__main__":
    entry()
