"""What Ctrl-C does to a training job, and when."""

import hashlib
import os
import queue
import signal
import threading
import time

import pytest

from latent_delib.machine.stopping import graceful_stop

SAID = "stopped by Ctrl-C; the same command resumes at the newest checkpoint\n"


@pytest.fixture
def ended(monkeypatch):
    """Gets (exit code, when) instead of an end of this process."""
    codes = queue.Queue()
    monkeypatch.setattr(os, "_exit", lambda code: codes.put((code, time.monotonic())))
    return codes


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_one_lets_the_step_be_saved_and_the_second_does_not(ended, capfd):
    with graceful_stop(ctrl_c=True) as stop:
        stop.is_training = True
        interrupt()
        until = time.monotonic() + 10
        while not (said := capfd.readouterr().err) and time.monotonic() < until:
            time.sleep(0.01)
        assert said == (
            "stopping after two more steps at most, and saving; "
            "press Ctrl-C again to stop at once\n"
        )
        assert stop.signal == signal.SIGINT and ended.empty()
        interrupt()
        assert ended.get(timeout=10)[0] == 130
    assert capfd.readouterr().err == SAID


def test_before_the_first_step_it_ends_at_once(ended, capfd):
    """Though the main thread hears of no signal in one long call of C, such as a compilation."""
    with graceful_stop(ctrl_c=True):
        threading.Timer(0.1, interrupt).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)
        compiled = time.monotonic()
        code, when = ended.get(timeout=10)
    assert code == 130 and when < compiled
    assert capfd.readouterr().err == SAID


def test_sigterm_always_saves(ended):
    with graceful_stop(ctrl_c=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and ended.empty()


def test_signals_are_as_before_outside_a_command_and_afterwards(ended):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with graceful_stop(), pytest.raises(KeyboardInterrupt):
        interrupt()
        time.sleep(10)
    with graceful_stop(ctrl_c=True):
        pass
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        with graceful_stop(ctrl_c=True):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
