"""The page of each tool names the command that starts it: as a script it would not find the other tools."""

import ast
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_each_page_names_its_command():
    for path in sorted(TOOLS.glob("*.py")):
        source = path.read_text()
        if '__name__ == "__main__"' in source:
            assert f"python -m tools.{path.stem}" in ast.get_docstring(ast.parse(source)), path.name
