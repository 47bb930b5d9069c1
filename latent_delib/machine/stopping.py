"""Stops a training job by a signal: the job saves first, but a second Ctrl-C ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from latent_delib.errors import INTERRUPTED


class Stop:
    """Holds the requests that signals make.

    Attributes:
      signal: the first signal that asked the job to save and stop; 0 before one.
      is_training: whether training steps run now.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.is_training = False
        self.warned = False

    def request(self, number: int, _frame: Any = None) -> None:
        """Handles a signal: the loop sees `signal` after the step it is in."""
        if not self.signal:
            self.signal = number

    def ctrl_c(self) -> None:
        """Announces the stop; at a second Ctrl-C, or before the first step, ends the process.

        It raises no exception for that: jax's clean-up may crash after an interrupted compile.
        """
        if self.is_training and not self.warned:
            self.warned = True
            _say(
                "stopping after two more steps at most, and saving; "
                "press Ctrl-C again to stop at once"
            )
            return
        _say("stopped by Ctrl-C; the same command resumes at the newest checkpoint")
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def graceful_stop(ctrl_c: bool = False) -> Iterator[Stop]:
    """Turns SIGTERM, and Ctrl-C with `ctrl_c`, into a request that the loop sees after its step.

    Only commands should set `ctrl_c`, because Ctrl-C may end the process. If Ctrl-C is ignored, as
    with nohup, it stays ignored.
    """
    stop = Stop()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_handled(signal.SIGTERM, stop.request))
        if ctrl_c and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            stack.enter_context(_handled(signal.SIGINT, stop.request))
            stack.enter_context(_heard_at_once(signal.SIGINT, stop.ctrl_c))
        yield stop


@contextlib.contextmanager
def _handled(number: int, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Sets the handler of a signal, and in the end restores the handler before it."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def _heard_at_once(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in a thread at each signal `number`.

    The main thread handles no signal while XLA compiles or a step runs.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        heard = os.read(reader, 1)
        while heard:
            if heard[0] == number:
                act()
            heard = os.read(reader, 1)
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
