"""How signals stop a training job: SIGTERM and Ctrl-C let it save first, a second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from latent_delib.errors import INTERRUPTED

LOOK = 2.0  # seconds


class Stop:
    """What signals have asked for.

    by: the first signal that asked the job to save and to stop; 0 before one. steps: whether the job makes steps, so
    that there is something to save. saved: gives the newest step that is saved, 0 without one.
    """

    def __init__(self) -> None:
        self.by = 0
        self.steps = False
        self.saved: Callable[[], int] = lambda: 0
        self.warned = False

    def request(self, number: int, _frame: Any = None) -> None:
        self.by = self.by or number

    def ctrl_c(self) -> None:
        """Says what will happen; ends the process where nothing needs to be waited for, or it was told before.

        Not by an exception: after a compile that one has ended, jax's clean-up at exit crashes now and then.
        """
        if self.steps and not self.warned:
            self.warned = True
            _say("stopping after two more steps at most, and saving; press Ctrl-C again to stop at once")
            return
        _say(f"stopped by Ctrl-C; {self.what_is_saved()}")
        os._exit(INTERRUPTED)

    def what_is_saved(self) -> str:
        """Says which step is saved, as far as that is known within LOOK seconds: a store may not answer."""
        found: list[int] = []

        def look() -> None:
            with contextlib.suppress(Exception):  # whatever it is, the process is to end
                found.append(self.saved())

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(LOOK)
        if not found:
            return "the same command resumes at the newest checkpoint"
        return f"step {found[0]} is saved, the same command resumes" if found[0] else "nothing is saved yet"


@contextlib.contextmanager
def graceful_stop(ctrl_c: bool = False) -> Iterator[Stop]:
    """Turns SIGTERM into a request that the loop sees after the step it is in; with `ctrl_c`, Ctrl-C too.

    Ctrl-C may end the process, so it is for commands. Where it is ignored, as with nohup, it stays ignored.
    """
    stop = Stop()
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop.request))
        if ctrl_c and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, stop.request))
            stack.enter_context(_heard_at_once(signal.SIGINT, stop.ctrl_c))
        yield stop


@contextlib.contextmanager
def _heard_at_once(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in a thread at each such signal: the main thread hears of none while XLA compiles or a step runs."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while heard := os.read(reader, 1):
            if heard[0] == number:
                act()
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _say(text: str) -> None:
    """Prints a line, past Python's buffers: the main thread may hold their lock."""
    os.write(2, f"{text}\n".encode())
