"""Streams datasets from the Hugging Face Hub, or from local folders.

Streamed text is not stored on this machine. Without a network the library reads what an earlier
`datasets.load_dataset` has stored in its cache (HF_HOME). HF_TOKEN gives access to private
and gated datasets.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

from latent_delib.data import questions
from latent_delib.data.sources import Hub, check_features, has_questions
from latent_delib.data.text_files import digest_of_files
from latent_delib.errors import Outage, UserError, extra, reason, store_error

with extra("hub"):
    import datasets
    from datasets import exceptions

_LOOK = 100  # records that are read to find the features of JSON lines, which declare none
_COMMIT = re.compile("[0-9a-f]{40}")


class HubDataset:
    """Implements `text.Reader` for a split of a dataset: `parts` has a name for each file.

    `cycle` is 1, so that the order of texts does not depend on how many files the cache has.

    Raises:
      UserError: there is no such dataset, split or text feature; or the cache does not have the
        dataset, and HF_HUB_OFFLINE is set.
      Outage: the cache does not have the dataset, and the Hub does not answer.
    """

    cycle = 1
    unit = "record"

    def __init__(self, source: str, meant: Hub):
        self.source = source
        self.meant = meant
        with self._errors():
            self.builder = self._find()
            stream = self.builder.as_streaming_dataset(split=meant.split)
            check_features(source, *_texts(stream))
        self.stream = stream.select_columns(list(meant.features))
        self.parts = [f"{source}, file {i + 1}" for i in range(stream.num_shards)]

    def contents(self, part: str) -> Iterator[bytes]:
        """Yields the texts of one file. Raises UserError if the file is lost or damaged."""
        content = questions.line_of if has_questions(self.source) else _content
        with self._errors():
            for record in self.stream.shard(len(self.parts), self.parts.index(part)):
                yield content(*[record[name] for name in self.meant.features])

    def work(self, part: str) -> str:
        return ""  # each record is a work of its own

    def num_bytes(self) -> int:
        return 0  # not known

    def fingerprint(self) -> str:
        """Returns a digest of the revision on the Hub, or of the files of a local folder."""
        if self.meant.is_local:
            files = self.builder.config.data_files[self.meant.split]
            kind = self.source.replace(f"hf:{self.meant.name}:", "hf:", 1)
            return digest_of_files(self.source, kind, files)
        return hashlib.sha256(repr((self.source, self.builder.hash)).encode()).hexdigest()

    def _find(self) -> Any:
        """Returns the builder of the dataset, which knows its files."""
        _, name, config, revision, *_ = self.meant
        if self.meant.is_local and not os.path.isdir(name):
            raise self._error("no such folder")
        try:
            found = datasets.load_dataset_builder(name, config or None, revision=revision or None)
        except exceptions.DatasetNotFoundError as error:
            raise self._error(_not_found(error, revision)) from None
        except ConnectionError:
            raise self._unanswered("not in the library's cache") from None
        # Where the Hub does not answer, the library takes whatever revision it has.
        if _COMMIT.fullmatch(revision) and found.hash != revision:
            raise self._unanswered(f"the library's cache has {found.hash}")
        return found

    def _unanswered(self, text: str) -> UserError | Outage:
        """Returns the error for a revision that only the Hub could give."""
        if datasets.config.HF_HUB_OFFLINE:
            return self._error(f"{text}, and the client is offline (HF_HUB_OFFLINE)")
        return Outage(errno.ECONNABORTED, f"{text}, and the Hub does not answer", self.source)

    def _error(self, text: str) -> UserError:
        return UserError(f"config.data: source {self.source!r}: {text}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises UserError for data that is missing or damaged, OSError where the Hub fails."""
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise self._error(reason(error)) from None
        except Exception as error:  # of this library, or of another that reads a file format for it
            failed = store_error(error, self.source)
            if failed or not isinstance(
                error, ValueError | RuntimeError | exceptions.DatasetsError
            ):
                raise failed or error from None
            raise self._error(reason(error)) from None


def _not_found(error: Exception, revision: str) -> str:
    """Returns why the Hub does not give a dataset, and the remedy."""
    told = str(error)
    if "gated" in told:
        return "needs permission; accept its terms on the Hub, then set HF_TOKEN"
    if told.startswith("Revision"):
        return f"that dataset has no revision {revision!r}"
    return "no such dataset on the Hub; a private one needs HF_TOKEN"


def _content(text: str | None) -> bytes:
    """Returns the text of a record, which may hold null."""
    return (text or "").encode()


def _texts(stream: Any) -> tuple[list[str], list[str]]:
    """Returns the names of the features that hold text, and of those that hold lists of text."""
    features = stream.features
    if features is None:
        features = datasets.Dataset.from_list(list(itertools.islice(stream, _LOOK))).features
    texts = [name for name in features if _is_text(features[name])]
    lists = [name for name in features if _is_text(getattr(features[name], "feature", None))]
    return texts, lists


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")
