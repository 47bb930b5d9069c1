"""Runs many processes as one job: they start, decide and end together.

A process that dies, in whatever way, closes the connections that it made in the roll call. The
others notice at once, and end instead of waiting for it in a collective.
"""

import atexit
import contextlib
import hashlib
import json
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.errors import INTERRUPTED, LOST, Outage, UserError, device_lost, no_memory
from latent_delib.machine.commands import leave
from latent_delib.machine.roll_call import (
    GRACE,
    SILENCE,
    Connections,
    find_place,
    meet,
    read_line,
    send_line,
)

FLAGS = {
    "distributed": (False, "this is one of several processes of the job"),
    "start_timeout": (300, "seconds within which all processes of a --distributed job must start"),
}
MESSAGE = 1000  # bytes that each process can say in `from_all`


@contextlib.contextmanager
def job(flags: Any) -> Iterator[None]:
    """Joins the processes of a --distributed job, and holds them together until all are done.

    It is entered before any device is used. The exit code tells whether to start the job again:

      1     No. A process ended with 1, and so do all others: a mistake, a failed disk, a bug or too
            little memory would stop the job again.
      LOST  Yes. A process was killed, its machine was lost, or a store or the Hub does not answer.
            The others end GRACE seconds later, SILENCE more if the network does not report the
            loss.

    Raises:
      UserError: the processes do not all start within `flags.start_timeout` seconds, or do not fit
        each other.
    """
    if not flags.distributed:
        yield
        return
    address, count, index = find_place(flags.start_timeout)
    with held_together(index, meet(address, count, index, flags.start_timeout)):
        # jax's preemption service would handle SIGTERM in our place
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            address, count, index, initialization_timeout=flags.start_timeout
        )
        here = f"{jax.local_device_count()} of {jax.device_count()} devices"
        print(f"process {index} of {count}: {here}, coordinator {address}", flush=True)
        yield


def split_cores(devices: int) -> None:
    """Has jax split this machine's CPU into `devices`, unless the environment gives a number."""
    flags = os.environ.get("XLA_FLAGS", "")
    said = "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ
    if devices > 1 and not said:
        jax.config.update("jax_num_cpu_devices", devices)


@contextlib.contextmanager
def held_together(index: int, connections: Connections) -> Iterator[None]:
    """Ends this process when another ends too early, and tells the others when this one does."""
    others = Others(index, connections)
    try:
        yield
    except BaseException as error:
        code = _exit_code(error, others)
        others.fail(code)
        atexit.register(leave, code)  # before jax's exit handler, which waits for all processes
        raise
    others.finish()


def check_same(**texts: str) -> None:
    """Raises UserError unless all processes call this with the same texts, such as config=..."""
    for name, text in texts.items():
        digests = from_all(hashlib.sha256(text.encode()).hexdigest())
        for process, digest in enumerate(digests):
            if digest != digests[0]:
                raise UserError(
                    f"process {process} has another {name} than process 0: expected the same "
                    "command and files on every worker"
                )


def from_first(value: Any) -> Any:
    """Returns the value of process 0 on every process; JSON must be able to hold it."""
    return json.loads(bytes_from_first(json.dumps(value).encode()))


def on_first(look: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function on process 0 alone, and returns its result on every process.

    Every process must call this. `look` must not wait for another process, and JSON must be able
    to hold its result.

    Raises:
      UserError: `look` raises one; every process raises it.
    """
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"result": look(*arguments)}
        except UserError as error:
            answer = {"mistake": str(error)}
    answer = from_first(answer)
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    return answer["result"]


def bytes_from_first(content: bytes) -> bytes:
    """Returns the bytes of process 0 on every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = content[:size].ljust(size, b"\0")
    return multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8)).tobytes()


def from_all(text: str) -> list[str]:
    """Returns the text of each process, by process number, cut to MESSAGE bytes each."""
    if jax.process_count() == 1:
        return [text]
    padded = text.encode()[:MESSAGE].ljust(MESSAGE, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def warn(line: str) -> None:
    """Prints a warning once for all processes."""
    if jax.process_index() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def vote(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """Returns a function: this process's yes or no -> number of devices that say yes, int32.

    All processes of the mesh must call it. The call does not wait; reading its result does.
    """
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ballots = {}
    for said in (False, True):
        local = np.full(len(mesh.local_devices), said, np.int32)
        ballots[said] = jax.make_array_from_process_local_data(each, local, (mesh.size,))
    count = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda said: count(ballots[said])


class Others:
    """Watches the other processes in a thread, and ends this one when another ends too early.

    When process 0 ends, jax aborts the others at once. So process 0 ends last, if it can.
    """

    def __init__(self, index: int, connections: Connections):
        self.index = index
        self.connections = connections
        self.failing = threading.Event()  # this process is ending by itself
        self.none_left = threading.Event()
        self.one_lost = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def finish(self) -> None:
        """Returns when all processes have called this."""
        if self.index:
            self._tell("done")
        self.none_left.wait()
        if not self.index:
            self._tell("done")

    def fail(self, code: int) -> None:
        """Tells the others that this process ends with an exit code."""
        self.failing.set()
        self._tell(f"{code} {self.index}")
        if not self.index:
            self.none_left.wait(GRACE + 1)

    def _tell(self, text: str) -> None:
        for connection in self.connections.values():
            send_line(connection, text)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    words = read_line(key.fileobj).split()
                    if not words:  # the process is gone
                        self._follow(key.data, LOST)
                    elif words != ["done"]:
                        code, process = map(int, words)
                        self._follow(process, code)
                    selector.unregister(key.fileobj)
        self.none_left.set()

    def _follow(self, process: int, code: int) -> None:
        """Ends this process because another has ended, unless it is ending by itself."""
        if not self.index:
            self._tell(f"{code} {process}")
        if code != 1:
            self.one_lost.set()
        patience = GRACE if self.index else GRACE + 1
        if self.index and process == 0 and code == LOST:
            patience = 0.0  # process 0 is gone, and jax aborts at once
        if self.failing.wait(patience):
            return
        if code == 1:
            text = (
                f"process {process} ended with an error, see its own output; this one ends with it"
            )
        else:
            code = LOST
            text = f"process {process} is gone: crashed, killed, or cut off; run again to resume"
        print(f"error: {text}", file=sys.stderr)
        leave(code)


def _exit_code(error: BaseException, others: Others) -> int:
    """Returns the exit code for the error that ended the work here.

    When another process is gone, a collective fails, with an exception of any kind and maybe before
    the loss is known. So after an error of unknown kind this process waits for news of the others.
    If one is lost, the watching thread ends this process.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Outage) or device_lost(error):
        return LOST
    if isinstance(error, UserError | OSError) or no_memory(error) or not others.connections:
        return 1
    if not others.one_lost.wait(GRACE):
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(
            f"failed: {text}; waiting {SILENCE} s to learn whether another was lost",
            file=sys.stderr,
            flush=True,
        )
        if not others.one_lost.wait(SILENCE):
            return 1
    time.sleep(2 * GRACE)  # the watching thread ends this process meanwhile
    return LOST
