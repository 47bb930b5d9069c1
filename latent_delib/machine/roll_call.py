"""Finds the processes of a job: process 0 calls the roll over TCP, and names the missing ones.

jax.distributed aborts when its time-out expires, and names no missing process. So the roll call
comes first, on the coordinator's port, which jax takes over afterwards. The connections stay open,
for `distributed.Others` to watch.
"""

import contextlib
import os
import re
import socket
import time

from latent_delib.errors import UserError, reason

SILENCE = 40  # seconds after which a machine that no longer answers counts as gone
GRACE = 5.0  # seconds in which a process can end by itself, and say why, once another has ended
HELLO = "latent_delib"
COMPLETE = "all are there"
REFUSED = "refused "

# process -> connection. Process 0 has one to each other process, and each other one to process 0.
Connections = dict[int, socket.socket]


def find_place(seconds: float) -> tuple[str, int, int]:
    """Returns the coordinator's address, the count of processes, and the number of this process.

    They come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where set, else
    from the cluster (Cloud TPU, GKE, Slurm).
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number_from_environment("JAX_NUM_PROCESSES")
    index = _number_from_environment("JAX_PROCESS_ID")
    if None in (address, count, index):
        # what jax.distributed.initialize asks; it has no public name
        from jax._src.clusters import ClusterEnv

        ask = ClusterEnv.auto_detect_unset_distributed_params
        try:
            address, count, index, _ = ask(address, count, index, None, None, seconds)
        except Exception as error:
            raise UserError(f"--distributed: {reason(error)}") from None
    if None in (address, count, index):
        raise UserError(
            "--distributed: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are not "
            "all set, and no cluster was found that sets them (Cloud TPU, GKE, Slurm)"
        )
    port = re.fullmatch(r".+:(\d+)", address)
    if port is None or int(port[1]) > 65535:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT, of process 0")
    return address, count, index


def meet(address: str, count: int, index: int, seconds: float) -> Connections:
    """Returns the connections of this process, once all processes are there.

    Raises:
      UserError: processes did not connect within `seconds`, and the message names their numbers; a
        number is given twice, or does not fit; the coordinator does not answer.
    """
    if index == 0:
        return _call_roll(address, count, seconds)
    return _answer_roll(address, count, index, seconds)


def send_line(connection: socket.socket, text: str) -> None:
    """Sends a line. If the other side is gone, this is noticed when the connection is read."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{text}\n".encode())


def read_line(connection: socket.socket) -> str:
    """Returns one line; "" where the connection ends first, or its time-out expires."""
    line = b""
    with contextlib.suppress(OSError):
        while len(line) < 10_000:
            byte = connection.recv(1)
            if byte == b"\n":
                return line.decode(errors="replace")
            if not byte:
                break
            line += byte
    return ""


def _number_from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise UserError(f"{name}={value}: expected a number")
    return int(value)


def _call_roll(address: str, count: int, seconds: float) -> Connections:
    """Waits, as process 0, for the other processes, and tells them to start, or why not."""
    there: Connections = {}
    until = time.monotonic() + seconds
    refusal = ""
    port = int(address.rpartition(":")[2])
    try:
        with _listen(port, min(until, time.monotonic() + 30)) as listener:
            while len(there) < count - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                connection, _ = listener.accept()
                gone = [process for process in there if _is_closed(there[process])]
                for process in gone:
                    del there[process]  # the process may start again
                _enter(connection, there, count)
    except TimeoutError:
        absent = [str(process) for process in range(1, count) if process not in there]
        refusal = (
            f"--distributed: {len(absent)} of {count} processes did not connect to {address} "
            f"within {seconds:g} s: number {', '.join(absent)}; is the command running on every "
            "worker, and the port open between them?"
        )
    except UserError as error:
        refusal = str(error)
    for connection in there.values():
        send_line(connection, f"{REFUSED}{refusal}" if refusal else COMPLETE)
    if refusal:
        raise UserError(refusal)
    return there


def _enter(connection: socket.socket, there: Connections, count: int) -> None:
    """Reads the number of a new process, and adds its connection to `there`.

    Raises:
      UserError: the number is wrong.
    """
    connection.settimeout(5)
    found = re.fullmatch(rf"{HELLO} (\d+) (\d+)", read_line(connection))
    if found is None:  # another program
        connection.close()
        return
    process, its_count = int(found[1]), int(found[2])
    if its_count == count and 0 < process < count and process not in there:
        there[process] = _keep_alive(connection)
        return
    host = connection.getpeername()[0].removeprefix("::ffff:")
    refusal = (
        f"--distributed: a process on {host} was started as number {process} of {its_count}; "
        f"expected 1 ... {count - 1} of {count}, each once, besides process 0"
    )
    send_line(connection, f"{REFUSED}{refusal}")
    raise UserError(refusal)


def _answer_roll(address: str, count: int, index: int, seconds: float) -> Connections:
    """Connects, as any other process, to process 0, which tells when all are there."""
    host, _, port = address.rpartition(":")
    place = (host.strip("[]"), int(port))
    until = time.monotonic() + seconds
    while True:
        answer = "it hung up, or said nothing"
        try:
            connection = _keep_alive(socket.create_connection(place, timeout=5))
        except OSError as error:
            answer = reason(error)
        else:
            # Process 0 has a limit of its own, and may have begun to wait later.
            connection.settimeout(seconds + GRACE)
            send_line(connection, f"{HELLO} {index} {count}")
            answer = read_line(connection) or answer
            if answer == COMPLETE:
                connection.settimeout(None)
                return {0: connection}
            if answer.startswith(REFUSED):
                raise UserError(answer.removeprefix(REFUSED))
            connection.close()
        if time.monotonic() > until:
            raise UserError(
                f"--distributed: process 0 does not answer at {address} within {seconds:g} s "
                f"({answer}): is the command running there, and the port open?"
            )
        time.sleep(0.5)


def _listen(port: int, until: float) -> socket.socket:
    """Returns a socket that listens on all addresses; waits while an ended job holds the port."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(
                ("", port), family=family, dualstack_ipv6=both, backlog=1024
            )
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--distributed: cannot open port {port} of the coordinator: {reason(error)}"
                ) from None
        time.sleep(0.5)


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Enables TCP keep-alive, which notices a lost machine after SILENCE seconds."""
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


def _is_closed(connection: socket.socket) -> bool:
    """Tells whether the other side has hung up."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
