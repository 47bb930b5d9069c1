"""Parses source strings, which name text, and finds the local files that they name.

packaged/train, packaged/validation   the text in data/corpus
files:GLOB                            files of documents, separated by lines that hold only a form
                                      feed; ** in any GLOB means folders at any depth, and is for
                                      files on this machine
lines:GLOB                            files with a document on each line
qa:GLOB, qa_steps:GLOB                JSON lines of questions with answers; with steps too
qa_steps-K:GLOB                       the same without the first K steps of each question
tfds:NAME:SPLIT:FEATURE               a TFDS dataset in $TFDS_DATA_DIR; nothing is downloaded
hf:OWNER/NAME:SPLIT:FEATURE           a dataset on the Hugging Face Hub, streamed; also
                                      hf:OWNER/NAME/CONFIG:... and hf:OWNER/NAME@REVISION:...
hf:FOLDER:SPLIT:FEATURE               such a dataset in a folder that begins with /, ./ or ../
"""

import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from latent_delib.errors import UserError

PACKAGED = ("packaged/train", "packaged/validation")
FORMS = (
    *PACKAGED,
    "files:GLOB",
    "lines:GLOB",
    "qa:GLOB",
    "qa_steps[-K]:GLOB",
    "tfds:NAME:SPLIT:FEATURE",
    "hf:OWNER/NAME[/CONFIG][@REVISION]:SPLIT:FEATURE",
    "hf:./FOLDER:SPLIT:FEATURE",
)
_FILES = re.compile(r"(files|lines|qa|qa_steps(?:-\d+)?):(.*)", re.DOTALL)
_TFDS = re.compile(r"tfds:(.+):([^:[\]]+(?:\[.*\])?):([^:]+)")
_HUB = re.compile(r"hf:([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?:([\w.-]+):([^:]+)")
_FOLDER = re.compile(r"hf:(\.{0,2}/.+):([\w.-]+):([^:]+)")
CORPUS = pathlib.Path(__file__).parent / "corpus"


class Files(NamedTuple):
    """Names text files.

    kind: "files", for files of documents; or "lines", "qa", "qa_steps" or "qa_steps-K", for files
      with a document on each line.
    pattern: a glob of the files.
    """

    kind: str
    pattern: str

    @property
    def has_questions(self) -> bool:
        return self.kind.startswith("qa")

    @property
    def with_steps(self) -> bool:
        return self.kind.startswith("qa_steps")

    @property
    def removed(self) -> int:
        """Returns how many steps of each question, from the first on, are left out."""
        _, _, count = self.kind.partition("-")
        return int(count or 0)


class Tfds(NamedTuple):
    """Names a split of a TFDS dataset, and the feature that holds its text."""

    name: str
    split: str
    feature: str


class Hub(NamedTuple):
    """Names a split of a dataset on the Hugging Face Hub, and the feature that holds its text.

    name: OWNER/NAME, or a local folder.
    config, revision: "" where the source names none.
    """

    name: str
    config: str
    revision: str
    split: str
    feature: str

    @property
    def is_local(self) -> bool:
        return self.name.startswith((".", "/"))


def parse(source: str) -> Files | Tfds | Hub:
    """Parses a source string; opens no file.

    Raises:
      UserError: the string has none of FORMS.
    """
    if source in PACKAGED:
        folder = CORPUS / source.removeprefix("packaged/")
        return Files("files", f"{glob.escape(str(folder))}/*.txt")
    files = _FILES.fullmatch(source)
    if files and files[2]:
        if "://" in files[2] and not files[2].startswith("gs://"):
            raise UserError(
                f"config.data: source {source!r}: expected files on this machine or on gs://"
            )
        if "://" in files[2] and "**" in files[2]:
            raise UserError(
                f"config.data: source {source!r}: ** is for files on this machine; name each depth"
            )
        return Files(*files.groups())
    tfds = _TFDS.fullmatch(source)
    if tfds:
        return Tfds(*tfds.groups())
    hub = _HUB.fullmatch(source)
    if hub:
        return Hub(*hub.groups(default=""))
    local = _FOLDER.fullmatch(source)
    if local:
        name, split, feature = local.groups()
        return Hub(name, "", "", split, feature)
    raise UserError(
        f"config.data: unknown source {source!r}, expected one of the forms {', '.join(FORMS)}"
    )


def has_questions(source: str) -> bool:
    """Tells whether a source holds questions with answers."""
    meant = parse(source)
    return isinstance(meant, Files) and meant.has_questions


def has_steps(source: str) -> bool:
    """Tells whether a source has questions with the steps to their answers."""
    meant = parse(source)
    return isinstance(meant, Files) and meant.with_steps


def source_of(given: str) -> str:
    """Returns a source string of a command line unchanged, and files:GIVEN for a path."""
    if given.startswith(("packaged/", "tfds:", "hf:")) or _FILES.match(given):
        return given
    return f"files:{given}"


def local_files(pattern: str) -> list[str]:
    """Finds local files and folders: the one of this name, else all that the pattern matches."""
    if os.path.exists(pattern):
        return [pattern]
    return glob.glob(pattern, recursive=True, include_hidden=True)


def only_files(source: str, found: Iterable[str], is_folder: Callable[[str], bool]) -> list[str]:
    """Returns the files among the matches of a source's pattern, sorted.

    Raises:
      UserError: there are none.
    """
    found = sorted(set(found))
    files = [path for path in found if not is_folder(path)]
    if files:
        return files
    meant = parse(source)
    if found:
        folder = found[0].rstrip("/")
        ending = "jsonl" if meant.has_questions else "txt"
        raise UserError(
            f"config.data: source {source!r}: {folder} is a folder, "
            f"did you mean {meant.kind}:{folder}/*.{ending}?"
        )
    raise UserError(f"config.data: source {source!r}: no file matches {meant.pattern!r}")


def texts_of(source: str) -> set[str]:
    """Returns what a source reads: the real paths of its local files, else the source itself."""
    meant = parse(source)
    if isinstance(meant, Files) and "://" not in meant.pattern:
        return {os.path.realpath(path) for path in local_files(meant.pattern)}
    return {source}


def common_folder(paths: Iterable[str]) -> str:
    """Returns the innermost folder that holds all of these files."""
    return os.path.commonprefix(list(paths)).rpartition("/")[0]


def check_files(sources: Iterable[str]) -> None:
    """Raises UserError unless each source has a known form, and its local files exist."""
    for source in sources:
        meant = parse(source)
        if isinstance(meant, Files) and "://" not in meant.pattern:
            only_files(source, local_files(meant.pattern), os.path.isdir)
