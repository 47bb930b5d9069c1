"""Measures the package beside what a PyTorch user would run for the same work, on the CPU.

  ./launch/setup.sh reference gguf     # torch, transformers; torch.compile needs g++
  .venv/bin/python -m latent_delib.convert --source="$(./launch/get_smollm2.sh)" \
      --size=smollm2_135m --out=runs/smollm2_135m/decoder
  .venv/bin/python -m pip install llama-cpp-python==0.3.36     # for row 7: by cmake and g++
  .venv/bin/python -m benchmarks.peers [--rows=1,3] [--rounds=7] [--json=runs/peers.json]

Prints one Markdown table, and writes it as JSON too; docs/results/peers.json is that of
docs/performance.md. Its rows:

  1  training a plain decoder
  2  the same, 0.16 M parameters
  3  a coprocessor's training step
  4  scoring texts with SmolLM2-135M
  5  greedy decoding with it, batch 1 and 8
  6  prepare, 16 MB of text, vocabulary 512
  7  as 5, beside llama.cpp instead of transformers; left out where it is not installed

Every side of a row is a process of its own. It gets ready, does its work twice, and waits. Then the
sides take turns, one at a time, `--rounds` times: a turn repeats the work for at least `--least`
seconds. Figures are medians over the turns, with the least and the most; a ratio is that of turns
of the same round, over the fastest peer. Where both sides return figures, such as
log-probabilities, the table says whether they are the same. All is float32, on all cores that the
process may use.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from benchmarks import common, peer_llama, peer_sides
from benchmarks.peer_sides import Work
from latent_delib.machine.columns import markdown

SAME = 1e-3  # relative difference of figures that count as the same
# As the commands of the package set it for themselves, here for both sides.
ENVIRONMENT = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}

Side = Callable[[argparse.Namespace], Work]


class Row(NamedTuple):
    """Holds one line of the table.

    counted: what its figures count. sides: "ours", and peers by name.
    """

    work: str
    unit: str
    counted: str
    sides: Mapping[str, Side]


# Turns.


def serve(connection: Connection, side: Side, a: argparse.Namespace) -> None:
    """Gets a side ready and sends its figures, then answers every message with a turn's rate."""
    work = side(a)
    for _ in range(2):
        found = work.run()
    connection.send(None if found is None else [float(x) for x in found])
    while connection.recv():
        calls, began = 0, time.perf_counter()
        while not calls or time.perf_counter() - began < a.least:
            work.run()
            calls += 1
        connection.send(calls * work.amount / (time.perf_counter() - began))


@contextlib.contextmanager
def started(side: Side, a: argparse.Namespace) -> Iterator[Connection]:
    """Yields the connection to a side's process, which ends with the context."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, side, a), daemon=True)
    with mock.patch.dict(os.environ, {"JAX_PLATFORMS": "cpu", **ENVIRONMENT}):
        process.start()
    there.close()  # so that a process that fails ends the connection
    try:
        yield here
    finally:
        process.terminate()
        process.join()


def measure(row: Row, a: argparse.Namespace) -> dict[str, Any]:
    """Returns the row's figures: rates of every side, and the ratio to the fastest peer."""
    figures, workers = {}, {}
    with contextlib.ExitStack() as stack:
        for name, side in row.sides.items():
            print(f"{row.work}: {name} gets ready", flush=True)
            workers[name] = stack.enter_context(started(side, a))
            try:
                # Then it waits, and the next one has the machine for itself.
                figures[name] = workers[name].recv()
            except EOFError:
                sys.exit(f"{row.work}: {name} failed, as it says above")
        rates = {name: [] for name in workers}
        for _ in range(a.rounds):
            for name, worker in workers.items():
                worker.send(True)
                rates[name].append(worker.recv())
    ours = rates.pop("ours")
    peer = max(rates, key=lambda name: statistics.median(rates[name]))
    told = [figures[name] for name in rates if figures[name] is not None]
    same = [share_of_same(figures["ours"], found) for found in told]
    return {
        "work": row.work,
        "unit": row.unit,
        "counted": row.counted,
        "ours": {**spread(ours), "all": ours},
        "theirs": {name: {**spread(found), "all": found} for name, found in rates.items()},
        "peer": peer,
        "ratio": spread([x / y for x, y in zip(ours, rates[peer])]),
        "same": min(same, default=None),
    }


def spread(found: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def share_of_same(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the share of figures that differ by at most SAME."""
    if len(ours) != len(theirs):
        return 0.0
    return float(np.mean(np.isclose(ours, theirs, rtol=SAME, atol=0)))


# The table.


def training(job: Callable, *peers: bool) -> dict[str, Callable]:
    """Returns the sides of a training row; `peers`: whether each is compiled."""
    names = {True: "torch compiled", False: "torch eager"}
    theirs = {
        names[compiled]: partial(peer_sides.train_theirs, job=job, compiled=compiled)
        for compiled in peers
    }
    return {"ours": partial(peer_sides.train_ours, job=job), **theirs}


def decoding(batch: int, peer: str, theirs: Callable) -> Row:
    return Row(
        f"greedy decoding with SmolLM2-135M, batch {batch}",
        "tokens/s",
        f"{peer_sides.NEW} new tokens per row, with the reading of {peer_sides.PROMPT} before them",
        {
            "ours": partial(peer_sides.decode_ours, batch=batch),
            peer: partial(theirs, batch=batch),
        },
    )


STEP = "text tokens of whole steps: loss, gradient, clipping, Adam"
ROWS: dict[str, tuple[Row, ...]] = {
    "1": (
        Row(
            "training a plain decoder (3.15 M, T 256, B 8)",
            "tokens/s",
            STEP,
            training(peer_sides.decoder_job, True, False),
        ),
    ),
    "2": (
        Row(
            "the same, 0.16 M (2 layers, D 64, V 512, T 128, B 32)",
            "tokens/s",
            STEP,
            training(peer_sides.tiny_job, True, False),
        ),
    ),
    "3": (
        Row(
            "training a coprocessor of the first decoder (T 256, B 8, M 8, L 8, A 16, overlay)",
            "tokens/s",
            STEP,
            training(peer_sides.coprocessor_job, True),
        ),
    ),
    "4": (
        Row(
            f"scoring {peer_sides.TEXTS} texts with SmolLM2-135M",
            "tokens/s",
            "tokens that got a log-probability; batches of 16 here, one text at a time there",
            {"ours": peer_sides.score_ours, "transformers": peer_sides.score_theirs},
        ),
    ),
    "5": tuple(decoding(batch, "transformers", peer_sides.decode_theirs) for batch in (1, 8)),
    "6": (
        Row(
            "`prepare`, 16 MB of text, vocabulary 512",
            "MB/s",
            "bytes of text; ours is the command with its start-up, "
            "theirs tokenizes alone on one thread",
            {"ours": peer_sides.prepare_ours, "sentencepiece": peer_sides.prepare_theirs},
        ),
    ),
    "7": tuple(decoding(batch, "llama.cpp", peer_llama.decode) for batch in (1, 8)),
}
OPTIONAL = {"7": "llama_cpp"}  # rows, and the library that each needs


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def cell(found: Mapping[str, float]) -> str:
    return f"{number(found['median'])} ({number(found['least'])}-{number(found['most'])})"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of docs/performance.md."""
    lines = []
    for row in rows:
        theirs = "; ".join(f"{name} {cell(found)}" for name, found in row["theirs"].items())
        same = "-" if row["same"] is None else f"{row['same']:.0%}"
        cells = (
            f"{row['work']}, {row['unit']}",
            theirs,
            cell(row["ours"]),
            cell(row["ratio"]),
            same,
        )
        lines.append(cells)
    return markdown(["work", "theirs", "ours", "ratio", "same figures"], lines)


def versions() -> dict[str, str | None]:
    """Returns the versions of the peers' libraries; None where one is missing."""
    found = dict.fromkeys(("torch", "transformers", "sentencepiece", "llama-cpp-python"))
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = common.command_line(__doc__)
    rows = [row for row in ROWS if row not in OPTIONAL or importlib.util.find_spec(OPTIONAL[row])]
    parser.add_argument("--rows", default=",".join(rows), help="numbers with commas between")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every side")
    parser.add_argument(
        "--least", type=float, default=5.0, help="seconds that a turn lasts at least"
    )
    parser.add_argument(
        "--smollm2", type=Path, default="runs/smollm2_135m/decoder", help="decoder folder of it"
    )
    parser.add_argument(
        "--folder", type=Path, default="runs/peers", help="for what the rows make for themselves"
    )
    parser.add_argument("--json", type=Path, default="runs/peers.json", help="the file to write")
    a = parser.parse_args(argv)
    unknown = sorted(set(a.rows.split(",")) - set(ROWS))
    if unknown:
        parser.error(f"--rows={a.rows}: expected some of {', '.join(ROWS)}")
    measured = [measure(row, a) for chosen in a.rows.split(",") for row in ROWS[chosen]]
    jax.config.update("jax_platforms", "cpu")
    result = {
        "benchmark": "peers",
        "command": shlex.join(["python", "-m", "benchmarks.peers", *argv]),
        **common.machine(),
        "versions": versions(),
        "settings": {"rounds": a.rounds, "least": a.least},
        "rows": measured,
    }
    print(f"{result['processor']}, {result['cores']} cores, {result['date']}", end="")
    libraries = {"jax": result["jax"], **result["versions"]}
    print("".join(f", {name} {version}" for name, version in libraries.items()))
    print(table(measured), flush=True)
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
