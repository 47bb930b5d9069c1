"""Lists the commands: python -m latent_delib."""

import ast
from pathlib import Path

from latent_delib.machine import commands


def main(values: object) -> None:
    del values
    print("The commands, each with --help:\n")
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


if __name__ == "__main__":
    commands.run(main, __doc__)
