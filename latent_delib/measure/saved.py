"""Sums on disk: those of each document for good, and partial ones from which a killed evaluation goes on."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from latent_delib.machine import distributed, files
from latent_delib.machine.distributed import warn
from latent_delib.measure.first import is_first
from latent_delib.measure.perplexity import Sums, SumsByTerm
from latent_delib.measure.text import ValidationText


def write_documents(file: epath.Path, text: ValidationText, sums: SumsByTerm) -> None:
    """Writes documents.npz: the sums of each document, with its source and, where that is known, its work."""
    about = {"source": text.source, "sources": np.array(text.sources)}
    if text.works_known:
        about |= {"work": text.work, "works": np.array(text.works)}
    _write_npz(file, about | _arrays(sums))


class PartialSums:
    """Saves the sums of an evaluation that goes on, in a file that only the same evaluation reads again.

    identity: whatever the sums depend on, as JSON can hold it.
    """

    def __init__(self, file: epath.Path, identity: Any):
        self.file = file
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def save(self, sums: SumsByTerm, done: int) -> None:
        """Saves the sums of `done` pieces; called on process 0 alone."""
        _write_npz(self.file, {"identity": self.identity, "done": done} | _arrays(sums))

    def restore(self, zeros: SumsByTerm) -> tuple[SumsByTerm, int]:
        """Returns the saved sums, and of how many pieces they are; `zeros` and 0 without a file, or with another one.

        Every process gets what process 0 finds.
        """
        content = self.file.read_bytes() if is_first() and self.file.exists() else b""
        content = distributed.bytes_from_first(content)
        if not content:
            return zeros, 0
        problem = "of another config, checkpoint, decoder, text or mesh"
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as saved:
                if str(saved["identity"]) == self.identity:
                    return _sums(saved, zeros), int(saved["done"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            problem = f"damaged ({' '.join(str(error).split())})"
        warn(f"{self.file} is {problem}: the evaluation begins anew")
        return zeros, 0

    def remove(self) -> None:
        """Removes the file; called on process 0 alone."""
        self.file.unlink(missing_ok=True)


def _names(term: str) -> list[str]:
    """Returns the names under which the three arrays of a term are stored; older files have those of "nll" alone."""
    if term == "nll":
        return list(Sums._fields)
    return ["tokens", f"decoder_{term}", f"augmented_{term}"]


def _arrays(sums: SumsByTerm) -> dict[str, np.ndarray]:
    """Returns the arrays of all terms, by the names under which they are stored."""
    arrays: dict[str, np.ndarray] = {}
    for term, each in sums.items():
        arrays |= zip(_names(term), each)
    return arrays


def _sums(arrays: Mapping[str, np.ndarray], like: SumsByTerm) -> dict[str, Sums]:
    """Returns the sums of the same terms as `like`, from what `_arrays` made."""
    sums = {}
    for term in like:
        sums[term] = Sums(*(arrays[name] for name in _names(term)))
    return sums


def _write_npz(file: epath.Path, arrays: Mapping[str, Any]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    files.write(file, content.getvalue())
