"""Reads TFDS datasets in $TFDS_DATA_DIR; downloads nothing.

TensorFlow is imported only for datasets that are stored as tfrecord, the default of TFDS. Datasets
that are stored as array_record do not need it.
"""

import os
from collections.abc import Iterator
from typing import Any

from latent_delib.data import questions
from latent_delib.data.sources import Tfds, check_features, has_questions
from latent_delib.data.text_files import CYCLE, bytes_of_files, digest_of_files, reading
from latent_delib.errors import UserError, extra, reason

with extra("tfds"):
    import tensorflow_datasets as tfds

_READ = 256  # records that are read at once


class TfdsDataset:
    """Implements `text.Reader` for a split of a TFDS dataset.

    `parts` has the paths of its files and, where a slice begins inside a file, the number of
    records before it. `cycle` is 1 where the order of records matters.

    Raises:
      UserError: there is no such dataset, split, slice of the split or text feature.
    """

    unit = "record"

    def __init__(self, source: str, meant: Tfds):
        self.source = source
        self.features = meant.features
        self.info = _find(source, meant).info
        try:
            parts = self.info.splits[meant.split].file_instructions
        except ValueError as error:  # for example, a slice begins after the last record
            raise UserError(f"config.data: source {source!r}: {reason(error)}") from None
        self.files = {}
        for part in parts:
            after = f" after record {part.skip}" if part.skip else ""
            self.files[part.filename + after] = part
        self.paths = [part.filename for part in parts]
        self.parts = list(self.files)
        self.cycle = 1 if self.info.disable_shuffling else CYCLE

    def contents(self, part: str) -> Iterator[bytes]:
        """Yields the texts of one file. Raises UserError if the file is lost or damaged."""
        features = {name: self.info.features[name] for name in self.features}
        features = tfds.features.FeaturesDict(features)  # no other feature is decoded
        asks = has_questions(self.source)
        read = _array_records
        if self.info.file_format.value == "tfrecord":
            read = _tfrecords
        with reading([part]):
            for record in read(self.files[part]):
                found = features.deserialize_example_np(record)
                values = [found[name] for name in self.features]
                yield questions.line_of(*map(_text, values)) if asks else values[0]

    def work(self, part: str) -> str:
        return ""  # each record is a work of its own

    def num_bytes(self) -> int:
        return bytes_of_files(self.source, self.paths)

    def fingerprint(self) -> str:
        """Returns a digest of all files, which does not depend on their folder."""
        return digest_of_files(self.source, self.source, self.paths)


def _find(source: str, meant: Tfds) -> tfds.core.DatasetBuilder:
    """Returns the builder of a prepared dataset.

    Raises:
      UserError: there is no such dataset, split or text feature, or the file format is unknown.
    """
    name, split = meant.name, meant.split.partition("[")[0]
    folder = os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
    try:  # from files only: the general tfds.builder asks the network for datasets it knows
        found = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        raise UserError(
            f"config.data: source {source!r}: no dataset {name!r} in {folder} (TFDS_DATA_DIR)"
        ) from None
    features = found.info.features
    names = sorted(features)  # a dataset's file keeps no order
    texts = [key for key in names if isinstance(features[key], tfds.features.Text)]
    inner = {key: getattr(features[key], "feature", None) for key in names}
    lists = [key for key in inner if isinstance(inner[key], tfds.features.Text)]
    if split not in found.info.splits:
        splits = ", ".join(found.info.splits)
        raise UserError(f"config.data: source {source!r}: no split {split!r}, {name} has {splits}")
    check_features(source, texts, lists)
    form = found.info.file_format.value
    if form not in ("tfrecord", "array_record"):
        raise UserError(
            f"config.data: source {source!r}: stored as {form}, expected array_record or tfrecord"
        )
    return found


def _text(value: Any) -> str | list[str]:
    """Returns the text of bytes, or of a list of bytes; `questions.encode` tells of bad ones."""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return [each.decode(errors="surrogateescape") for each in value]


def _array_records(part: Any) -> Iterator[bytes]:
    """Yields the records of a part of an array_record file."""
    with extra("tfds"):
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    try:
        with ArrayRecordDataSource([part]) as records:
            for start in range(0, len(records), _READ):
                stop = min(start + _READ, len(records))
                yield from records.__getitems__(range(start, stop))
    except (IndexError, RuntimeError, ValueError) as error:  # the library has no error types
        raise UserError(f"config.data: reading {part.filename!r}: {reason(error)}") from None


def _tfrecords(part: Any) -> Iterator[bytes]:
    """Yields the records of a part of a tfrecord file."""
    with extra("seqio", ", up to Python 3.13; a dataset stored as array_record needs none of it"):
        from latent_delib.data.tensorflow import tf
    records = tf.data.TFRecordDataset(part.filename).skip(part.skip).take(part.take)
    yield from records.as_numpy_iterator()
