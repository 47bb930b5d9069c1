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
qa:tfds:..., qa:hf:...                questions of such a dataset: QUESTION,ANSWER for FEATURE
qa_steps:tfds:..., qa_steps-K:hf:...  with steps too: QUESTION,ANSWER,STEPS; or QUESTION,ANSWER,
                                      where the answer is "STEPS #### ANSWER"
"""

import functools
import glob
import os
import pathlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

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
    "qa:(hf|tfds):...:SPLIT:QUESTION,ANSWER",
    "qa_steps[-K]:(hf|tfds):...:SPLIT:QUESTION,ANSWER[,STEPS]",
)
_FILES = re.compile(r"(files|lines|qa|qa_steps(?:-\d+)?):(.*)", re.DOTALL)
_DATASET = re.compile(r"(?:(qa|qa_steps(?:-\d+)?):)?((?:tfds|hf):.*)", re.DOTALL)
_TFDS = re.compile(r"tfds:(.+):([^:[\]+]+(?:\[[^[\]]*\])?):([^:]+)")  # no sum of splits
_HUB = re.compile(r"hf:([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?:([\w.-]+):([^:]+)")
_FOLDER = re.compile(r"hf:(\.{0,2}/.+)()():([\w.-]+):([^:]+)")  # no config, no revision
CORPUS = pathlib.Path(__file__).parent / "corpus"


class Files(NamedTuple):
    """Names text files.

    kind: "files", for files of documents; or "lines", "qa", "qa_steps" or "qa_steps-K", for files
      with a document on each line.
    pattern: a glob of the files.
    """

    kind: str
    pattern: str


class Tfds(NamedTuple):
    """Names a split of a TFDS dataset.

    kind: "text", "qa", "qa_steps" or "qa_steps-K".
    split: may have a slice, such as train[:1%].
    features: the name of the text; or those of question, answer and perhaps steps.
    """

    kind: str
    name: str
    split: str
    features: tuple[str, ...]

    @property
    def whole_split(self) -> str:
        """Returns the name of the split without its slice."""
        return f"tfds:{self.name}:{self.split.partition('[')[0]}"


class Hub(NamedTuple):
    """Names a split of a dataset on the Hugging Face Hub.

    name: OWNER/NAME, or a local folder.
    config, revision: "" where the source names none.
    kind, features: as of Tfds.
    """

    kind: str
    name: str
    config: str
    revision: str
    split: str
    features: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        return self.name.startswith((".", "/"))

    @property
    def whole_split(self) -> str:
        """Returns the name of the split, which is the same for all revisions."""
        name = os.path.realpath(self.name) if self.is_local else self.name
        return f"hf:{name}/{self.config}:{self.split}"


def require_string(source: Any) -> None:
    """Raises UserError unless a source is a string."""
    if not isinstance(source, str):
        kind = type(source).__name__
        raise UserError(f"config.data: source {source!r} is {kind}, expected a string")


@functools.cache  # it is asked again for each document
def parse(source: str) -> Files | Tfds | Hub:
    """Parses a source string; opens no file.

    Raises:
      UserError: the string has none of FORMS, or another number of features.
    """
    if source in PACKAGED:
        folder = CORPUS / source.removeprefix("packaged/")
        return Files("files", f"{glob.escape(str(folder))}/*.txt")
    dataset = _DATASET.fullmatch(source)
    files = _FILES.fullmatch(source)
    if dataset:
        kind, named = dataset.groups("text")
        for form, pattern in ((Tfds, _TFDS), (Hub, _HUB), (Hub, _FOLDER)):
            found = pattern.fullmatch(named)
            if found:
                *where, features = found.groups("")
                return form(kind, *where, _features(source, kind, features))
    elif files and files[2]:
        if "://" in files[2] and not files[2].startswith("gs://"):
            raise UserError(
                f"config.data: source {source!r}: expected files on this machine or on gs://"
            )
        if "://" in files[2] and "**" in files[2]:
            raise UserError(
                f"config.data: source {source!r}: ** is for files on this machine; "
                "write one * for each folder"
            )
        return Files(*files.groups())
    raise UserError(
        f"config.data: unknown source {source!r}, expected one of the forms {', '.join(FORMS)}"
    )


def _features(source: str, kind: str, named: str) -> tuple[str, ...]:
    """Divides the names of features. Raises UserError for another number than the kind takes."""
    if kind == "text":
        return (named,)
    features = tuple(named.split(","))
    form, counts = "QUESTION,ANSWER", (2,)
    if kind != "qa":
        form, counts = "QUESTION,ANSWER[,STEPS]", (2, 3)
    if len(features) not in counts or not all(features):
        raise UserError(f"config.data: source {source!r}: features {named!r}, expected {form}")
    return features


def has_questions(source: str) -> bool:
    """Tells whether a source holds questions with answers."""
    return parse(source).kind.startswith("qa")


def has_steps(source: str) -> bool:
    """Tells whether a source has questions with the steps to their answers."""
    return parse(source).kind.startswith("qa_steps")


def is_on_hub(source: str) -> bool:
    """Tells whether a source is a dataset on the Hugging Face Hub."""
    meant = parse(source)
    return isinstance(meant, Hub) and not meant.is_local


def removed_steps(source: str) -> int:
    """Returns how many steps of each question, from the first on, are left out."""
    _, _, count = parse(source).kind.partition("-")
    return int(count or 0)


def check_features(source: str, texts: list[str], lists: list[str]) -> None:
    """Raises UserError unless a dataset has the features that a source names.

    Args:
      texts: the features that hold text.
      lists: those that hold lists of text. Steps may be either.
    """
    for place, feature in enumerate(parse(source).features):
        known = [*texts, *lists] if place == 2 else texts
        if feature not in known:
            names = ", ".join(known) or "none"
            raise UserError(
                f"config.data: source {source!r}: no text feature {feature!r}; "
                f"text features: {names}"
            )


def source_of(given: str) -> str:
    """Returns a source string of a command line unchanged, and files:GIVEN for a path."""
    if given.startswith("packaged/") or _DATASET.match(given) or _FILES.match(given):
        return given
    return f"files:{given}"


def local_files(pattern: str) -> list[str]:
    """Finds local files and folders: the one of this name, else all that the pattern matches.

    As in a shell, a pattern finds no names that begin with a dot, unless it begins with one too. A
    file that several paths lead to, by symbolic links, is found once.
    """
    if os.path.exists(pattern):
        return [pattern]
    last_first = sorted(glob.glob(pattern, recursive=True), reverse=True)
    return list({os.path.realpath(path): path for path in last_first}.values())


def only_files(source: str, found: Iterable[str]) -> list[str]:
    """Returns the files among the matches of a source's pattern, sorted.

    Raises:
      UserError: there are none.
    """
    found = sorted(set(found))
    with ThreadPoolExecutor(32) as pool:  # a store answers many calls at once
        is_folder = list(pool.map(lambda path: epath.Path(path).is_dir(), found))
    files = [path for path, is_one in zip(found, is_folder) if not is_one]
    if files:
        return files
    meant = parse(source)
    if found:
        folder = found[0].rstrip("/")
        ending = "jsonl" if has_questions(source) else "txt"
        raise UserError(
            f"config.data: source {source!r}: {folder} is a folder, "
            f"did you mean {meant.kind}:{folder}/*.{ending}?"
        )
    raise UserError(f"config.data: source {source!r}: no file matches {meant.pattern!r}")


def common_folder(paths: Iterable[str]) -> str:
    """Returns the innermost folder that holds all of these files."""
    return os.path.commonprefix(list(paths)).rpartition("/")[0]


def check_files(sources: Iterable[str]) -> None:
    """Raises UserError unless each source has a known form, and its local files exist."""
    for source in sources:
        require_string(source)
        meant = parse(source)
        if isinstance(meant, Files) and "://" not in meant.pattern:
            only_files(source, local_files(meant.pattern))
