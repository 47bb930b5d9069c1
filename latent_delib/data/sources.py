"""Source strings, which name text: their forms, and the local files that they mean. Without TensorFlow.

packaged/train, packaged/validation   the text in data/corpus
files:GLOB                            files of documents, separated by lines that hold only a form feed
lines:GLOB                            files with a document on each line
tfds:NAME:SPLIT:FEATURE               a prepared TFDS dataset in $TFDS_DATA_DIR; never downloaded
"""

import difflib
import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from latent_delib.errors import UserError

PACKAGED = ("packaged/train", "packaged/validation")
KINDS = ("files", "lines", "tfds")
FORMS = (*PACKAGED, "files:GLOB", "lines:GLOB", "tfds:NAME:SPLIT:FEATURE")
_CORPUS = pathlib.Path(__file__).parent / "corpus"


class Files(NamedTuple):
    """Text files. kind: "files" of documents, or "lines", where each line is one."""

    kind: str
    pattern: str


class Tfds(NamedTuple):
    """A split of a TFDS dataset, and the feature that holds its text."""

    name: str
    split: str
    feature: str


def parse(source: str) -> Files | Tfds:
    """Returns what a source string means; looks at no file.

    Raises UserError unless it has one of the forms.
    """
    if source in PACKAGED:
        folder = _CORPUS / source.removeprefix("packaged/")
        return Files("files", f"{glob.escape(str(folder))}/*.txt")
    kind, _, rest = source.partition(":")
    if kind in ("files", "lines") and rest:
        return Files(kind, rest)
    parts = re.fullmatch(r"(.+):([^:[\]]+(?:\[.*\])?):([^:]+)", rest)
    if kind == "tfds" and parts:
        return Tfds(*parts.groups())
    guess = _guess(source)
    question = f", did you mean {guess!r}?" if guess else ","
    raise UserError(f"config.data: unknown source {source!r}{question} expected one of the forms {', '.join(FORMS)}")


def _guess(source: str) -> str | None:
    """Returns the source that was meant, perhaps."""
    if close := difflib.get_close_matches(source, PACKAGED, 1):
        return close[0]
    kind, colon, rest = source.partition(":")
    if not colon or rest.startswith("//"):  # a file's name alone
        return f"files:{source}" if source else None
    close = difflib.get_close_matches(kind, KINDS, 1)
    return f"{close[0]}:{rest}" if close and close[0] != kind else None


def local_files(pattern: str) -> list[str]:
    """Returns what is on the local disk: the file of just this name, or else all that the pattern matches."""
    return [pattern] if os.path.exists(pattern) else glob.glob(pattern, include_hidden=True)


def only_files(source: str, found: Iterable[str], is_folder: Callable[[str], bool]) -> list[str]:
    """Returns the files among what a source's pattern matches, sorted. Raises UserError where there are none."""
    files, folders = [], []
    for path in sorted(found):
        (folders if is_folder(path) else files).append(path)
    if files:
        return files
    kind, pattern = parse(source)
    if folders:
        folder = folders[0].rstrip("/")
        raise UserError(f"config.data: source {source!r}: {folder} is a folder, did you mean {kind}:{folder}/*.txt?")
    raise UserError(f"config.data: source {source!r}: no file matches {pattern!r}")


def check_files(sources: Iterable[str]) -> None:
    """Raises UserError unless the local files of each source are there; looks at no others."""
    for source in sources:
        meant = parse(source)
        if isinstance(meant, Files) and "://" not in meant.pattern:
            only_files(source, local_files(meant.pattern), os.path.isdir)
