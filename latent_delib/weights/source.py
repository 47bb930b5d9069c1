"""The interface of every checkpoint reader: the architecture, and how to read each tensor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_delib.nn.sizes import TransformerConfig


class Source(NamedTuple):
    """Describes a decoder on disk; no weight has been read.

    where: its path, for messages. form: a column of the tables in `names`. shapes: of every tensor,
    by its stored name. dtypes: of what `read` returns, bfloat16 as stored and float32 for all else
    that it holds exactly. read: reads one tensor. write_tokenizer: writes its tokenizer into a
    folder; None where it has none.
    """

    where: str
    form: str
    architecture: TransformerConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    write_tokenizer: Callable[[Path], Any] | None
