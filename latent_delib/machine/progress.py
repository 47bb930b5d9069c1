"""Prints the progress of a long job, with a rate and an ETA."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

EVERY = 5.0  # seconds between two lines
Item = TypeVar("Item")


class Progress:
    """Prints "WHAT DONE/TOTAL UNIT  RATE UNIT/s  ETA H:MM:SS" every EVERY seconds.

    Jobs shorter than EVERY print nothing. A total of 0 means that the total is not known; no ETA is
    printed then. `done` is work finished before a resume, which the rate does not count.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.began_with = done
        self.began = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said < EVERY or done <= self.began_with:
            return
        self.said = now
        rate = (done - self.began_with) / (now - self.began)
        of_all = eta = ""
        if self.total:
            of_all = f"/{self.total:,}"
            eta = f"  ETA {hours((self.total - done) / rate)}"
        counts = f"{done:,}{of_all} {self.unit}"
        print(f"{self.what} {counts}  {rate:,.3g} {self.unit}/s{eta}", flush=True)

    def over(self, items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[Item]:
        """Yields the items; after the use of each, size(item) more of the work is done."""
        done = self.began_with
        for item in items:
            yield item
            done += size(item)
            self(min(done, self.total) if self.total else done)


def hours(seconds: float) -> str:
    """Returns seconds as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
