"""What every reader of somebody's checkpoint gives: the architecture, the tensors' shapes, and a way to read one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_delib.nn.sizes import TransformerConfig


class Source(NamedTuple):
    """A decoder as it lies on disk; no weight has been read.

    where: for messages. form: a column of the tables in `names`. shapes, dtypes: of every tensor, by their name; dtypes
    are what `read` returns: bfloat16 as stored, all else as float32 where that is exact. read: one tensor.
    write_tokenizer: puts its tokenizer into a folder; None where it has none.
    """

    where: str
    form: str
    architecture: TransformerConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    write_tokenizer: Callable[[Path], Any] | None
