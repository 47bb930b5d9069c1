"""Many processes, one job: they find each other within a limit, decide together, and none outlives another.

jax connects processes without a word on who is missing, and aborts when its patience ends. So process 0 first calls the
roll over plain TCP, on the coordinator's port, which jax takes over afterwards. The connections stay open: a process
that dies, however it dies, closes its own, and the others end at once instead of waiting for it in a collective.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import selectors
import socket
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

from latent_delib.errors import INTERRUPTED, LOST, Outage, UserError, no_memory

FLAGS = {
    "distributed": (False, "this is one of several processes of the job"),
    "start_timeout": (300, "seconds within which all processes of a --distributed job must have started"),
}
GRACE = 5.0  # seconds in which a process can still end by itself, and say why, once another has ended
SILENCE = 40  # seconds after which a machine that no longer answers counts as gone
HELLO = "latent_delib"
MESSAGE = 1000  # bytes that each process can say in `from_all`

Connections = dict[int, socket.socket]  # by process: process 0 has one to each other, the others one to process 0


@contextlib.contextmanager
def job(flags: Any) -> Iterator[None]:
    """Joins the processes of a job started with --distributed, and holds them together until all are done.

    To be entered before any device is used. The coordinator's HOST:PORT, the number of processes and this one's come
    from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where set, else from the cluster (Cloud TPU, GKE,
    Slurm). If another process ends with exit code 1, so does this one; if it is killed, its machine lost or its
    checkpoints' store does not answer, this one ends with LOST: GRACE seconds later, SILENCE more where the network
    does not tell. What goes wrong while all others are there goes wrong again: a mistake, a failed disk, a bug or too
    little memory ends with 1.

    Raises:
      UserError: processes that did not start within `flags.start_timeout` seconds, by number; a number given twice, or
        one that does not fit; a coordinator that does not answer.
    """
    if not flags.distributed:
        yield
        return
    address, count, index = _place(flags.start_timeout)
    meet = _answer_roll if index else _call_roll
    others = _Others(index, meet(address, count, index, flags.start_timeout))
    try:
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        jax.distributed.initialize(address, count, index, initialization_timeout=flags.start_timeout)
        here = f"{jax.local_device_count()} of {jax.device_count()} devices"
        print(f"process {index} of {count}: {here}, coordinator {address}", flush=True)
        yield
    except BaseException as error:
        code = _exit_code(error, others)
        others.fail(code)
        atexit.register(_exit, code)  # runs before jax's own, which waits for all processes
        raise
    others.finish()


def _exit_code(error: BaseException, others: "_Others") -> int:
    """Returns the exit code for what ended the work here.

    A collective fails where another process is gone, with an exception of any kind and maybe before that is known: so
    news is waited for, and where one is gone, the thread that watches ends this process.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Outage):
        return LOST
    if isinstance(error, UserError | OSError) or no_memory(error) or not others.connections:
        return 1
    if not others.lost(within=GRACE):
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"failed: {text}; waiting {SILENCE} s for news of the other processes", file=sys.stderr, flush=True)
    if others.lost(within=SILENCE):
        time.sleep(2 * GRACE)
        return LOST
    return 1


def check_same(**texts: str) -> None:
    """Raises UserError unless all processes call this with the same texts; each name says what its text is of."""
    if jax.process_count() == 1:
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts.values()])
    every = multihost_utils.process_allgather(digests)
    for process, name in np.argwhere(np.any(every != every[0], axis=-1)):
        raise UserError(
            f"process {process} has another {list(texts)[name]} than process 0: expected the same command and files "
            "on every worker"
        )


def from_first(value: Any) -> Any:
    """Returns the value of process 0 on every process; JSON must be able to hold it."""
    return json.loads(bytes_from_first(json.dumps(value).encode()))


def bytes_from_first(content: bytes) -> bytes:
    """Returns the bytes of process 0 on every process."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = content[:size].ljust(size, b"\0")
    return multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8)).tobytes()


def from_all(text: str) -> list[str]:
    """Returns the text of each process, in their order; at most MESSAGE bytes of it."""
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
    """Returns the function from this process's yes or no to how many devices' processes say yes, int32.

    All processes of the mesh call it in turn. It waits for nothing; reading what it gives does.
    """
    each, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
    ballots = {
        said: jax.make_array_from_callback((mesh.size,), each, lambda _, said=said: np.full(1, said, np.int32))
        for said in (False, True)
    }
    count = jax.jit(jnp.sum, out_shardings=whole)
    return lambda said: count(ballots[said])


def _place(seconds: float) -> tuple[str, int, int]:
    """Returns the coordinator's address, the number of processes and this one's."""
    address, numbers = os.environ.get("JAX_COORDINATOR_ADDRESS"), []
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        if not re.fullmatch(r"\d*", value := os.environ.get(name, "")):
            raise UserError(f"{name}={value}: expected a number")
        numbers.append(int(value) if value else None)
    count, index = numbers
    if None in (address, count, index):
        from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; it has no public name

        try:
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                address, count, index, None, None, seconds
            )
        except Exception as error:
            raise UserError(f"--distributed: {' '.join(str(error).split())}") from None
    if None in (address, count, index):
        raise UserError(
            "--distributed: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are not all set, and there "
            "is no Cloud TPU, GKE or Slurm that would tell"
        )
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT, of process 0")
    if not index < count:
        raise UserError(f"JAX_PROCESS_ID={index}: expected 0 ... {count - 1}, for there are {count} processes")
    return address, count, index


def _call_roll(address: str, count: int, index: int, seconds: float) -> Connections:
    """As process 0, waits for all others, and tells them that all are there."""
    del index
    until, there = time.monotonic() + seconds, {}
    listener = _listen(int(address.rpartition(":")[2]), min(until, time.monotonic() + 30))

    def refuse(text: str) -> UserError:
        for connection in there.values():
            _send(connection, f"refused {text}")
        return UserError(f"--distributed: {text}")

    with listener:
        while len(there := {p: c for p, c in there.items() if not _closed(c)}) < count - 1:  # one may start again
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                absent = [str(process) for process in range(1, count) if process not in there]
                who = ", ".join(absent[:20]) + (", ..." if len(absent) > 20 else "")
                raise refuse(
                    f"{len(absent)} of {count} processes did not connect to {address} within {seconds:g} s: number "
                    f"{who}; is the command running on every worker, and the port open between them?"
                ) from None
            connection.settimeout(5)
            if not (found := re.fullmatch(rf"{HELLO} (\d+) (\d+)", _line(connection))):
                connection.close()  # none of ours
                continue
            process, said = map(int, found.groups())
            before = there.pop(process, None)
            there[process] = _keep_alive(connection)
            if said != count:
                raise refuse(f"process {process} was started as one of {said}, process 0 as one of {count}")
            if not 0 < process < count:
                raise refuse(f"a process was started as number {process}, expected 1 ... {count - 1} besides process 0")
            if before is not None and not _closed(before):
                there[-1] = before
                hosts = " and ".join(c.getpeername()[0].removeprefix("::ffff:") for c in (before, connection))
                raise refuse(f"two processes were started as number {process}, on {hosts}")
    for connection in there.values():
        _send(connection, "all are there")
    return there


def _answer_roll(address: str, count: int, index: int, seconds: float) -> Connections:
    """As every other process, finds process 0, and waits until it says that all are there."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            connection = _keep_alive(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
            connection.settimeout(seconds + GRACE)  # process 0 has a limit of its own, and may have begun to wait later
            _send(connection, f"{HELLO} {index} {count}")
            answer = _line(connection)
        except OSError as error:
            answer = error.strerror or str(error)
        else:
            if answer == "all are there":
                connection.settimeout(None)
                return {0: connection}
            if answer.startswith("refused "):
                raise UserError(f"--distributed: {answer.removeprefix('refused ')}")
            connection.close()
        if time.monotonic() > until:
            raise UserError(
                f"--distributed: process 0 does not answer at {address} within {seconds:g} s "
                f"({answer or 'it hung up, or said nothing'}): is the command running there, and the port open?"
            )
        time.sleep(0.5)


class _Others:
    """The other processes of the job, watched by a thread that ends this one when one of them ends too early.

    Where process 0 ends, jax aborts the others at once: if it can, it is the last to go.
    """

    def __init__(self, index: int, connections: Connections):
        self.index, self.connections = index, connections
        self.failing, self.none_left, self.one_lost = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, text: str) -> None:
        for connection in self.connections.values():
            _send(connection, text)

    def finish(self) -> None:
        """Returns when all processes have come here."""
        if self.index:
            self.tell("done")
        self.none_left.wait()
        if not self.index:
            self.tell("done")

    def lost(self, within: float) -> bool:
        """Returns whether another process is gone, or has lost one, now or within so many seconds."""
        return self.one_lost.wait(within)

    def fail(self, code: int) -> None:
        """Tells the others that this process ends with an exit code."""
        self.failing.set()
        self.tell(f"{code} {self.index}")
        if not self.index:
            self.none_left.wait(GRACE + 1)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    match _line(key.fileobj).split():
                        case [code, process]:
                            self._follow(int(process), int(code))
                        case []:
                            self._follow(key.data, LOST)
                    selector.unregister(key.fileobj)  # done, or gone as this one soon will be
        self.none_left.set()

    def _follow(self, process: int, code: int) -> None:
        """Ends this process because another has ended, unless it is ending by itself."""
        if not self.index:
            self.tell(f"{code} {process}")
        if code != 1:
            self.one_lost.set()
        abandoned = self.index and not process and code == LOST  # process 0 is gone
        if self.failing.wait(0 if abandoned else GRACE if self.index else GRACE + 1):
            return
        if code == 1:
            text = f"process {process} ended with an error, which its own output tells; this one ends with it"
        else:
            code, text = LOST, f"process {process} is gone: crashed, killed, or cut off; run again to resume"
        print(f"error: {text}", file=sys.stderr)
        _exit(code)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _listen(port: int, until: float) -> socket.socket:
    """Returns a socket that listens on all addresses; a job that just ended may hold the port for a moment."""
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() > until:
                reason = (error.strerror or str(error)).lower()
                raise UserError(f"--distributed: port {port}, the coordinator's, cannot be opened: {reason}") from None
        time.sleep(0.5)


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Lets a connection be silent for ever, but not without the other machine's kernel answering."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, SILENCE // 4),
        (socket.TCP_KEEPINTVL, SILENCE // 4),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 1000 * SILENCE),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _send(connection: socket.socket, text: str) -> None:
    """Sends a line; that the other side is gone is found when it is read."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{text}\n".encode())


def _line(connection: socket.socket) -> str:
    """Returns one line; "" where the connection ends before its end."""
    line = b""
    with contextlib.suppress(OSError):
        while len(line) < 10_000 and (byte := connection.recv(1)):
            if byte == b"\n":
                return line.decode(errors="replace")
            line += byte
    return ""


def _closed(connection: socket.socket) -> bool:
    """Returns whether the other side has hung up."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
