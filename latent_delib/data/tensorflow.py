"""Imports TensorFlow without the lines that it prints, and keeps it off the accelerator.

Import this module only where TensorFlow is needed.
"""

import contextlib
import os
from collections.abc import Iterator


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
# TensorFlow fetches a whole block for each small read; its own default is 64.
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")
with quiet():
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the accelerator's memory is JAX's
