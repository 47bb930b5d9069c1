"""Which row of which source is row i of the training: a function of (seed, i) that needs neither time nor memory.

A source may have 1e8 rows and more, so no shuffled list of them is ever made. A keyed permutation tells the place of
one row alone: a Feistel network scrambles all numbers of an even number of bits, one to one, and a number that it puts
beyond the size is scrambled again until it is below (cycle walking: J. Black and P. Rogaway, "Ciphers with arbitrary
finite domains", 2002). The hash within is that of splitmix64.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from latent_delib.errors import UserError

VERSION = "2"  # 1, until November 2026, sorted random numbers
BLOCK = 1024  # rows in which each source has exactly its share
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio: multiples of it are far apart


def _mix(x: np.ndarray) -> np.ndarray:
    """Returns uint64 of which each bit depends on every bit of `x`, one to one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*parts: Any) -> np.ndarray:
    """Hashes integers and arrays of them, which broadcast, to uint64."""
    found = np.zeros(1, np.uint64)
    for part in parts:
        found = _mix(found + _GOLDEN + np.asarray(part).astype(np.uint64))
    return found


def permute(index: np.ndarray, size: int, *key: Any) -> np.ndarray:
    """Returns where a random permutation of range(size), a function of `key` alone, puts each index: int64 [n].

    `key` is integers, or arrays [n] of them: then each index has a permutation of its own.
    """
    half = max(4, -(-(size - 1).bit_length() // 2))  # of the bits; 8 in all at least, or the network is too regular
    keys = np.broadcast_to(_hash(*key), index.shape)
    place = index.astype(np.uint64)
    beyond = np.full(index.shape, True)
    while beyond.any():
        place[beyond] = _feistel(place[beyond], np.uint64(half), keys[beyond])
        beyond = place >= np.uint64(size)
    return place.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, key: np.ndarray) -> np.ndarray:
    """Scrambles numbers of 2 x `half` bits: what a round does to one half, the other half can undo."""
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for _ in range(_ROUNDS):
        key = _mix(key + _GOLDEN)
        left, right = right, left ^ (_mix(key + right) & low)
    return left << half | right


def shares(weights: Iterable[float]) -> np.ndarray:
    """Returns how many rows of a block each source has, by largest remainders: int64 [sources], the sum is BLOCK."""
    weights = [float(weight) for weight in weights]
    exact = np.array(weights) / sum(weights) * BLOCK
    share = np.floor(exact).astype(int)
    share[np.argsort(share - exact, kind="stable")[: BLOCK - share.sum()]] += 1
    if not share.all():
        raise UserError(
            f"config.data.weights={tuple(weights)}: a source of less than 1/{BLOCK} would never be read; "
            f"of {BLOCK} rows they would have {share.tolist()}"
        )
    return share


class Order:
    """Which row of which source is row i of the training.

    Rows come in blocks in which each source has its share, in an order drawn for (seed, block). A source is read in
    epochs, each in an order drawn for (seed, source, epoch).
    """

    def __init__(self, seed: int, share: np.ndarray, rows: list[int]):
        self.seed, self.share, self.rows = seed, share, rows

    def __call__(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, row of that source), each int64 [stop - start], of the rows start ... stop - 1."""
        blocks = [self._block(block) for block in range(start // BLOCK, -(-stop // BLOCK))]
        here = slice(start % BLOCK, start % BLOCK + stop - start)
        source, count = (np.concatenate(part)[here] for part in zip(*blocks, strict=True))
        row = np.empty_like(count)
        for number, size in enumerate(self.rows):
            of_source = source == number
            epoch, index = np.divmod(count[of_source], size)
            row[of_source] = permute(index, size, self.seed, 1, number, epoch)
        return source, row

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, number of rows of that source before it), each int64 [BLOCK], of the rows of a block."""
        in_order = np.repeat(np.arange(len(self.share)), self.share)
        source = in_order[permute(np.arange(BLOCK), BLOCK, self.seed, 0, block)]
        count = np.empty_like(source)
        count[np.argsort(source, kind="stable")] = np.concatenate([np.arange(n) + block * n for n in self.share])
        return source, count
