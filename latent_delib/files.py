"""Files that appear whole or not at all, on a local disk or gs://."""

from etils import epath


def write(path: epath.Path, content: bytes) -> None:
    """A file under its name only once whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (partial := path.parent / f".{path.name}.tmp").write_bytes(content)
    partial.replace(path)
