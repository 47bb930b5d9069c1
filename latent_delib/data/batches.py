"""Training batches and validation documents, from text through seqio or from prepared token files."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from latent_delib.data.rows import check_data, pieces, segments
from latent_delib.errors import UserError

__all__ = ["pieces", "segments", "train_batches", "validation_documents"]


def _route(data):
    """The module that reads `data`. Only the second one imports TensorFlow."""
    if data.token_files:
        from latent_delib.data import token_files as route
    else:
        from latent_delib.data import tasks as route
    return route


def train_batches(
    data: Any,
    *,
    batch_size: int,
    seed: int,
    tokenizer_path: str,
    host: int = 0,
    num_hosts: int = 1,
    start_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of this host, batch `start_step` first: a function of (seed, step) on either route.

    Each is {"tokens": int32 [b, T], "segment": int32 [b, T]} with b = batch_size // num_hosts and
    T = data.seq_len; segment numbers the BOS-led pieces of a row from 1 and is 0 on padding.

    With `data.token_files` the order does not depend on the number of hosts, and any step is reached at once.
    Otherwise hosts share out the text, so the order depends on `num_hosts`, and the pipeline runs through
    `start_step` batches before it yields one, which takes time in proportion.

    Raises UserError, before the first batch, for sources that are missing, empty or do not fit `data`.
    """
    check_data(data)
    if batch_size % num_hosts:
        raise UserError(
            f"config.train.batch_size: {batch_size}, expected a multiple of the number of hosts, {num_hosts}"
        )
    return _route(data).train_batches(
        data,
        batch_size=batch_size,
        seed=seed,
        tokenizer_path=tokenizer_path,
        host=host,
        num_hosts=num_hosts,
        start_step=start_step,
    )


def validation_documents(data: Any, *, tokenizer_path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every document of `data.validation` once, in a fixed order: (source, tokens int32 [n] without BOS).

    Raises UserError, before the first document, for sources that are missing or empty.
    """
    if not data.validation:
        raise UserError("config.data.validation: empty, expected at least one source")
    return _route(data).validation_documents(data, tokenizer_path=tokenizer_path)
