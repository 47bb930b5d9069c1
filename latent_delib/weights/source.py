"""The interface of every checkpoint reader: the architecture, and how to read each tensor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_delib.nn.sizes import TransformerConfig


class Source(NamedTuple):
    """Describes a decoder on disk; no weight has been read.

    where: the path, for messages.
    form: a column of the tables in `names`.
    architecture: the decoder's architecture.
    shapes: stored name -> shape, of every tensor.
    dtypes: stored name -> dtype that `read` returns: bfloat16 for tensors stored so, else float32.
    read: reads one tensor, by its stored name.
    write_tokenizer: writes the tokenizer into a folder; raises UserError where there is none.
    """

    where: str
    form: str
    architecture: TransformerConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    write_tokenizer: Callable[[Path], Any]
