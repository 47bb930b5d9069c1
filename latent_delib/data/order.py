"""The order of training rows: row i is a function of (seed, i), found without a list of all rows.

A source may have 1e8 rows or more, so its rows are never listed and shuffled. Instead a keyed
permutation gives the place of a single row. It is a Feistel network: a one-to-one map of all
numbers with an even number of bits. A result that is not below the number of rows is mapped again,
until it is (cycle walking: J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002).
The network uses the hash function of splitmix64.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from latent_delib.errors import UserError

VERSION = "2"  # version 1, until November 2026, sorted random numbers
BLOCK = 1024  # rows in which each source has exactly its share
_ROUNDS = 8
# 2**64 divided by the golden ratio: multiples of it are far apart
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles uint64 one to one, so that each bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*parts: Any) -> np.ndarray:
    """Hashes integers, or arrays of integers that broadcast, to uint64."""
    found = np.zeros(1, np.uint64)
    for part in parts:
        found = _mix(found + _GOLDEN + np.asarray(part).astype(np.uint64))
    return found


def permute(index: np.ndarray, size: int, *key: Any) -> np.ndarray:
    """Returns where a random permutation of range(size) puts each index: int64 [n].

    `size` and `key` decide the permutation. A key is integers, or arrays [n] of integers, which
    give each index a permutation of its own.
    """
    bits = (size - 1).bit_length()
    half = max(4, (bits + 1) // 2)  # with fewer than 8 bits in all the network is too regular
    keys = np.broadcast_to(_hash(*key), index.shape)
    place = _feistel(index.astype(np.uint64), np.uint64(half), keys)
    beyond = place >= np.uint64(size)
    while beyond.any():  # these are scrambled again, until all are in range
        place[beyond] = _feistel(place[beyond], np.uint64(half), keys[beyond])
        beyond = place >= np.uint64(size)
    return place.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, key: np.ndarray) -> np.ndarray:
    """Scrambles numbers of 2 x `half` bits, one to one.

    Each round changes one half of the bits by a function of the other half.
    """
    low = (np.uint64(1) << half) - np.uint64(1)
    left = x >> half
    right = x & low
    for _ in range(_ROUNDS):
        key = _mix(key + _GOLDEN)
        left, right = right, left ^ (_mix(key + right) & low)
    return left << half | right


def shares(weights: Iterable[float]) -> np.ndarray:
    """Returns how many rows of a block each source has: int64 [sources], whose sum is BLOCK.

    Shares are rounded by the method of largest remainders.

    Raises:
      UserError: a source has less than one row of a block.
    """
    weights = [float(weight) for weight in weights]
    exact = np.array(weights) / sum(weights) * BLOCK
    share = np.floor(exact).astype(int)
    largest_first = np.argsort(share - exact, kind="stable")
    share[largest_first[: BLOCK - share.sum()]] += 1
    if exact.min() < 1:
        raise UserError(
            f"config.data.weights={tuple(weights)}: expected each to be at least 1/{BLOCK} of the "
            f"sum, found {min(weights) / sum(weights):.2g} of it"
        )
    return share


class Order:
    """Tells which row of which source is row i of training.

    Rows come in blocks. Each source has its share of a block, in an order drawn for (seed, block).
    A source is read in epochs, each in an order drawn for (seed, source, epoch).

    Args:
      seed: decides all of these orders.
      share: how many rows of a block each source has, from `shares`.
      rows: how many rows each source has.
    """

    def __init__(self, seed: int, share: np.ndarray, rows: list[int]):
        self.seed = seed
        self.share = share
        self.rows = rows

    def __call__(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows start ... stop - 1 as (source, row of that source).

        Each is int64 [stop - start].
        """
        first = start // BLOCK
        sources, counts = [], []
        last = (stop - 1) // BLOCK
        for block in range(first, last + 1):
            source, count = self._block(block)
            sources.append(source)
            counts.append(count)
        here = slice(start - first * BLOCK, stop - first * BLOCK)
        source = np.concatenate(sources)[here]
        count = np.concatenate(counts)[here]
        row = np.empty_like(count)
        for number, size in enumerate(self.rows):
            of_source = source == number
            epoch, index = np.divmod(count[of_source], size)
            row[of_source] = permute(index, size, self.seed, 1, number, epoch)
        return source, row

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for each row of a block, its source and how many rows of that source precede it.

        Each is int64 [BLOCK].
        """
        in_order = np.repeat(np.arange(len(self.share)), self.share)
        source = in_order[permute(np.arange(BLOCK), BLOCK, self.seed, 0, block)]
        count = np.empty_like(source)
        for number, share in enumerate(self.share):
            count[source == number] = np.arange(share) + block * share
        return source, count
