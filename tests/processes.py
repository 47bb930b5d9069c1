"""Several processes of one job on this machine, each with several simulated devices."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """Below those that the system hands out: it is used only seconds later."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Job:
    """Runs `count` processes of the same Python arguments, with `devices` devices each.

    As a context manager it kills what is left of them.
    """

    def __init__(self, count: int, devices: int, folder: Path, *arguments: str, **environment: str):
        flags = re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
        )
        shared = os.environ | {"XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": str(devices)}
        if count > 1:
            shared |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
                "JAX_NUM_PROCESSES": str(count),
            }
            arguments = (*arguments, "--distributed")
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{i}.txt" for i in range(count)]
        self.processes = []
        for i, file in enumerate(self.files):
            env = shared | {"JAX_PROCESS_ID": str(i)} | environment
            with open(file, "w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments], env=env, cwd=ROOT, stdout=out, stderr=out
                    )
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, process: int) -> str:
        return self.files[process].read_text(errors="replace")

    def wait_for(self, process: int, text: str, seconds: float = 300) -> None:
        """Returns once a process has printed a text."""
        until = time.monotonic() + seconds
        while text not in self.said(process):
            ended = self.processes[process].poll()
            assert ended is None and time.monotonic() < until, (
                f"{ended}, without {text!r}:\n{self.said(process)}"
            )
            time.sleep(0.02)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes of all."""
        until = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [process.wait(until - time.monotonic()) for process in self.processes]
        raise AssertionError("\n".join(f"--- {i}\n{self.said(i)}" for i in range(len(self.files))))
