"""The sources of the package, and the modules that each imports."""

import ast
import functools
from pathlib import Path

import latent_delib

PACKAGE = Path(latent_delib.__file__).parent


@functools.cache
def imports(source: str, name: str) -> set[str]:
    """Dotted names of all that a module imports, anywhere; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def sources(below: str = "") -> dict[str, str]:
    """Path in the package, without suffix -> source."""
    return {
        str(p.relative_to(PACKAGE).with_suffix("")): p.read_text()
        for p in (PACKAGE / below).rglob("*.py")
    }
