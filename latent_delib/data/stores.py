"""Text that only TensorFlow reads: files on stores such as gs://, and TFDS datasets.

Importing this module imports TensorFlow, so it is itself imported only where such text is read.
"""

import contextlib
import os
from collections.abc import Iterator

from latent_delib.data.sources import Tfds
from latent_delib.errors import UserError, extra


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the lines that TensorFlow prints from C++ at its import, which no log level stops."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with extra("seqio", ", up to Python 3.13. Token files on this machine need none of it"), quiet():
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # the accelerator's memory is JAX's

gfile = tf.io.gfile


def builder(meant: Tfds) -> tfds.core.DatasetBuilder:
    """Returns the builder of a prepared dataset in $TFDS_DATA_DIR.

    Raises:
      UserError: there is no such dataset, split or text.
    """
    name, split, feature = meant
    source = f"tfds:{name}:{split}:{feature}"
    folder = os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
    try:  # from files only: the general tfds.builder asks the network for datasets it knows
        found = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        raise UserError(
            f"config.data: source {source!r}: no dataset {name!r} in {folder} (TFDS_DATA_DIR)"
        ) from None
    features = found.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    for kind, value, known in (
        ("split", split.partition("[")[0], found.info.splits),
        ("text", feature, texts),
    ):
        if value not in known:
            names = ", ".join(known)
            raise UserError(
                f"config.data: source {source!r}: no {kind} {value!r}, {name} has {names}"
            )
    return found


def files_of(meant: Tfds) -> list[str]:
    """Returns the files of a split of a TFDS dataset."""
    split = builder(meant).info.splits[meant.split]
    return [part.filename for part in split.file_instructions]


def texts_of(meant: Tfds) -> Iterator[bytes]:
    """Yields the texts of a split of a TFDS dataset, in their order."""
    dataset = builder(meant).as_dataset(split=meant.split, shuffle_files=False)
    for record in dataset.as_numpy_iterator():
        yield record[meant.feature]
