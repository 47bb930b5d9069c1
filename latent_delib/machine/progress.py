"""How far a long job is: a line with rate and ETA."""

import time

EVERY = 5.0  # seconds between two lines


class Progress:
    """Prints "WHAT DONE/TOTAL UNIT  RATE UNIT/s  ETA H:MM:SS", the first line after EVERY seconds, then as often.

    What ends sooner prints nothing. A job that goes on where it stopped begins at `done`, which does not count as fast.
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
        eta, unit = hours((self.total - done) / rate), self.unit
        print(f"{self.what} {done:,}/{self.total:,} {unit}  {rate:,.3g} {unit}/s  ETA {eta}", flush=True)


def hours(seconds: float) -> str:
    """H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
