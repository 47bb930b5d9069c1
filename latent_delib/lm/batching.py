"""Brings rows of any length into few shapes, so that few programs are compiled."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

MOST_CONTINUATIONS = 8  # continuations of one prompt in one row, at most
CPU_TOKENS = 512  # enough for full speed on a CPU; more rows only add padding

Key = tuple[int, int]  # of a row: the number of its continuations, and its length in tokens


class Group(NamedTuple):
    """Holds a prompt and some of its continuations.

    head: the prompt's tokens.
    members: the numbers of the continuations.
    key: the number of continuations, rounded up to a power of two; and the length of the prompt
      with the longest of them.
    """

    head: tuple[int, ...]
    members: list[int]
    key: Key


def by_shape(keys: Sequence[Key], size: Callable[[Key], int]) -> Iterator[list[int]]:
    """Yields batches of row indices.

    The rows of a batch have equally many continuations and similar lengths. Those with the most
    come first, and among them the longest.

    Args:
      keys: for each row, the number of its continuations and its length.
      size: returns the number of rows in a batch, given the largest key in it.
    """
    order = sorted(range(len(keys)), key=lambda i: keys[i], reverse=True)
    while order:
        first = keys[order[0]]
        batch = [i for i in order[: size(first)] if keys[i][0] == first[0]]
        yield batch
        order = order[len(batch) :]


def rows_per_batch(mesh: Mesh, batch_size: int, key: Key) -> int:
    """Returns the number of rows in a batch whose largest key is `key`.

    A CPU reads a power of two with at most CPU_TOKENS tokens, unless the batch is smaller.
    """
    continuations, length = key
    most = max(1, batch_size // continuations)
    if mesh.devices.flat[0].platform != "cpu":
        return most
    rows = max(1, CPU_TOKENS // length)
    return min(most, 1 << (rows.bit_length() - 1))


def pad(rows: Sequence[Any], pad_id: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of tokens to one of few shapes.

    Args:
      multiple: the number of rows becomes a multiple of this.

    Returns:
      The rows, int32 [B, T], padded on the right, and their lengths, int32 [B]: 0 for a row that
      only fills the batch.
    """
    length_B = np.zeros(round_up(power_of_two(len(rows)), multiple), np.int32)
    length_B[: len(rows)] = [len(row) for row in rows]
    padded_BT = np.full((len(length_B), bucket(int(max(length_B)))), pad_id, np.int32)
    for b, row in enumerate(rows):
        padded_BT[b, : len(row)] = row
    return padded_BT, length_B


def groups(heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> list[Group]:
    """Groups continuations by their prompts, at most MOST_CONTINUATIONS of one prompt in a group.

    Args:
      heads: the prompt of each continuation.
      tails: the continuations.
    """
    by_head: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, head in enumerate(heads):
        by_head[tuple(head)].append(i)
    found = []
    for head, every in by_head.items():
        for first in range(0, len(every), MOST_CONTINUATIONS):
            members = every[first : first + MOST_CONTINUATIONS]
            longest = max(len(tails[i]) for i in members)
            found.append(Group(head, members, (power_of_two(len(members)), len(head) + longest)))
    return found


def pad_tails(
    batch: Sequence[Group],
    tails: Sequence[Sequence[int]],
    rows: int,
    pad_id: int,
    shards: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Pads the continuations of a batch of prompts.

    Args:
      rows: number of rows of the batch, including rows that only fill it.
      shards: devices over which M is split. M is a multiple of this number, or 1.

    Returns:
      The continuations, int32 [rows, M, A], padded on the right, and a mask, bool [rows, M, A],
      True except on padding.
    """
    M = max(power_of_two(len(group.members)) for group in batch)
    if M > 1:
        M = round_up(M, shards)
    longest = max(len(tails[i]) for group in batch for i in group.members)
    tails_BMA = np.full((rows, M, round_up(longest, 8)), pad_id, np.int32)
    inside_BMA = np.zeros(tails_BMA.shape, bool)
    for b, group in enumerate(batch):
        for m, i in enumerate(group.members):
            tails_BMA[b, m, : len(tails[i])] = tails[i]
            inside_BMA[b, m, : len(tails[i])] = True
    return tails_BMA, inside_BMA


def one_segment(tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """Returns 1 on the tokens of each row and 0 on its padding, int32 [B, T]."""
    return (jnp.arange(tokens_BT.shape[1]) < length_B[:, None]).astype(jnp.int32)


def round_up(n: int, multiple: int) -> int:
    """Returns the least multiple that is not below n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """Returns the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def bucket(n: int) -> int:
    """Returns a length rounded up, so that few lengths are compiled.

    Beyond 128 it grows by a fourth at most.
    """
    return round_up(n, max(32, power_of_two(n) // 8))
