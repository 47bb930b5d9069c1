"""Searches for the fastest mesh, accumulation and remat with which a job fits on a TPU slice.

Formulas (job/estimate.py) order all settings by estimated time. Only the compiler can tell whether
a setting fits, and that takes minutes. So settings are compiled in this order until some fit. Each
is compiled by the ordinary dry run, in a process of its own. Settings that cannot fit, or cannot be
faster than one that fits, are left out.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from latent_delib.errors import UserError
from latent_delib.job import dry_run, estimate, experiment
from latent_delib.job import plan as planning
from latent_delib.job.plan import gib
from latent_delib.machine import chips, files
from latent_delib.machine.columns import markdown

WANTED = 3  # settings that fit: estimates of time are rough, so the first may not be the fastest
REMAT = ("dots", "attention", "full")  # "none" repeats as much as "dots", and keeps more


class Setting(NamedTuple):
    """Holds the config values that a search varies; mesh.data takes the rest of the devices."""

    fsdp: int
    traces: int
    accumulation: int
    remat: str

    @property
    def keys(self) -> dict[str, Any]:
        """Returns config key -> value."""
        return {
            "mesh.data": -1,
            "mesh.fsdp": self.fsdp,
            "mesh.traces": self.traces,
            "train.accumulation": self.accumulation,
            "compute.remat": self.remat,
        }

    @property
    def flags(self) -> list[str]:
        """Returns the words of a command line that choose this setting."""
        return [f"--config.{key}={value}" for key, value in self.keys.items()]

    def needs_no_more_than(self, other: "Setting") -> bool:
        """Tells whether this setting surely needs no more memory than another, and is no faster.

        Such a setting splits the weights at least as much, and holds no more of a batch at once.
        """
        return (
            self.traces == other.traces
            and self.fsdp >= other.fsdp
            and self.accumulation >= other.accumulation
            and REMAT.index(self.remat) >= REMAT.index(other.remat)
        )


class Estimate(NamedTuple):
    """Holds a setting's estimate: seconds per step, and bytes that a device receives per step."""

    setting: Setting
    seconds: float
    received: float


class Verdict(NamedTuple):
    """Holds the compiler's verdict on a setting.

    result: the content of dry_run.json; None if the setting does not fit.
    error: one line that says why it does not fit; None if it fits.
    """

    setting: Setting
    result: dict[str, Any] | None
    error: str | None


def search(
    config: ConfigDict, workdir: str, topology: str, arguments: Sequence[str]
) -> list[dict[str, Any]]:
    """Prints the settings that fit, by estimated time per step, and writes WORKDIR/search.json.

    Args:
      config: the job's config; its mesh (except tensor), accumulation and remat are ignored.
      topology: the TPU slice, in the form of `dry_run.slice_of`.
      arguments: the words of the command line that made `config`.

    Returns:
      One row per setting that fits, as `row` makes it.

    Raises:
      UserError: a mistake in the config, a chip without figures, or nothing that fits.
    """
    if not topology:
        raise UserError("--search: expected --topology too, the TPU slice to compile for")
    files.check_writable(workdir)
    began = time.perf_counter()
    devices = dry_run.slice_of(topology)
    if None in chips.chip_of(devices[0]):
        known = [kind for kind, chip in chips.CHIPS.items() if None not in chip]
        raise UserError(
            f"--search: machine/chips.py has no data sheet of {devices[0].device_kind}; "
            f"expected one of {', '.join(known)}"
        )
    estimates = in_order(estimate_all(config, devices))
    print(f"{len(estimates)} settings, {processes()} compiled at once, {WANTED} wanted", flush=True)
    verdicts = first_to_fit(
        [each.setting for each in estimates],
        chips.chip_of(devices[0]).memory,
        lambda setting: least_memory(config, setting, devices),
        lambda settings: compile_all(settings, arguments),
    )
    fitting = {verdict.setting: verdict.result for verdict in verdicts if verdict.result}
    if not fitting:
        why = verdicts[-1].error if verdicts else "no setting leaves memory for its activations"
        raise UserError(f"--search: nothing fits on {topology}: {why}")
    rows = [row(each, fitting[each.setting]) for each in estimates if each.setting in fitting]
    took = time.perf_counter() - began
    print(f"compiled {len(verdicts)} settings in {took:.0f} s; {len(rows)} fit on {topology}:")
    form = next(iter(fitting.values()))["attention"]  # the same in all
    print(dry_run.note_on_attention(form, config, topology), end="")
    print(show(rows), flush=True)
    text = json.dumps(rows, indent=2)
    files.write(epath.Path(workdir) / "search.json", f"{text}\n".encode())
    return rows


def applied(config: ConfigDict, setting: Setting) -> ConfigDict:
    """Returns a copy of a config with a setting."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(setting.keys)
    return changed


def processes() -> int:
    """Returns the number of settings that are compiled at once: at most one per core."""
    return min(len(os.sched_getaffinity(0)), WANTED)


# Which settings, and in which order.


def settings(devices: int, batch_size: int) -> Iterator[Setting]:
    """Yields every setting that gives each device whole rows of each part of a batch.

    Args:
      devices: number of devices over which mesh.data, mesh.fsdp and mesh.traces divide the work.
      batch_size: rows of a batch.
    """
    for traces in _divisors(devices):
        row_shards = devices // traces
        if batch_size % row_shards:
            continue
        for fsdp in _divisors(row_shards):
            for accumulation in _divisors(batch_size // row_shards):
                for remat in REMAT:
                    yield Setting(fsdp, traces, accumulation, remat)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def estimate_all(config: ConfigDict, devices: Sequence[Any]) -> list[Estimate]:
    """Estimates every setting that a config allows.

    Raises:
      UserError: a mistake in the config, or a batch that no mesh divides.
    """
    chip = chips.chip_of(devices[0])
    given = applied(config, Setting(1, 1, 1, REMAT[-1]))
    experiment.read(given, devices)  # a mistake in other keys would be in every setting
    count = len(devices) // config.mesh.tensor
    found = []
    for setting in settings(count, config.train.batch_size):
        try:
            exp = experiment.read(applied(config, setting), devices)
        except UserError:  # traces that mesh.traces does not divide
            continue
        received = estimate.received(exp)
        computed = sum(estimate.device_flops(exp).values())
        weights = 4 * estimate.trained(exp) / (setting.fsdp * setting.traces * config.mesh.tensor)
        seconds = estimate.step_seconds(computed, received, weights, chip)
        found.append(Estimate(setting, seconds, received))
    if not found:
        raise UserError(
            f"--search: config.train.batch_size={config.train.batch_size} does not split over any "
            f"mesh of {count} devices: expected a multiple of {count}, or of {count} / mesh.traces"
        )
    return found


def in_order(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Sorts by time to two digits, then by traffic.

    Traffic that overlaps computation costs no time by the formulas, but some in practice.
    """
    return sorted(estimates, key=lambda each: (float(f"{each.seconds:.2g}"), each.received))


def least_memory(config: ConfigDict, setting: Setting, devices: Sequence[Any]) -> float:
    """Returns the bytes that a setting needs on a device at least.

    They are infinite where its mesh does not divide a weight.
    """
    exp = experiment.read(applied(config, setting), devices)
    try:
        plan = planning.make(exp)
    except UserError:
        return math.inf
    return sum(dry_run.held(exp, plan).values()) + estimate.activations(exp)


# Compiling.


def first_to_fit(
    ordered: Iterable[Setting],
    limit: float,
    least: Callable[[Setting], float],
    compile_all: Callable[[list[Setting]], list[Verdict]],
) -> list[Verdict]:
    """Compiles settings in order until WANTED fit, and returns all verdicts.

    A verdict decides other settings too. A setting that needs at least as much memory as a failed
    one cannot fit. A setting that surely needs no more than a fitting one is no faster. Neither is
    compiled.

    Args:
      ordered: the settings, the fastest first.
      limit: memory of a device, bytes.
      least: returns the bytes that a setting needs at least.
      compile_all: returns the verdicts on some settings.
    """
    verdicts: list[Verdict] = []

    def is_open(setting: Setting) -> bool:
        return not is_decided(setting, verdicts) and least(setting) <= limit

    open_settings = filter(is_open, ordered)
    while True:
        fitting = [verdict for verdict in verdicts if verdict.result]
        chosen = list(islice(open_settings, min(processes(), WANTED - len(fitting))))
        if not chosen:
            return verdicts
        verdicts += compile_all(chosen)


def is_decided(setting: Setting, verdicts: Iterable[Verdict]) -> bool:
    """Tells whether a verdict on another setting decides this one, too."""
    for verdict in verdicts:
        if verdict.result and setting.needs_no_more_than(verdict.setting):
            return True
        if verdict.error and verdict.setting.needs_no_more_than(setting):
            return True
    return False


def compile_all(settings: list[Setting], arguments: Sequence[str]) -> list[Verdict]:
    """Runs the dry run of each setting in a process, all at once, and prints the verdicts.

    Args:
      arguments: words of the command line. A setting's flags follow them, and so take effect.

    Raises:
      UserError: a dry run fails for another reason than memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = []
        try:
            for i, setting in enumerate(settings):
                workdir = Path(folder) / str(i)
                workdir.mkdir()
                words = [*arguments, "--nosearch", f"--workdir={workdir}", *setting.flags]
                running.append(_start(words, workdir / "log"))
            verdicts = []
            for i, setting in enumerate(settings):
                code = running[i].wait()
                verdicts.append(_verdict(setting, code, Path(folder) / str(i)))
            return verdicts
        finally:
            for process in running:
                process.kill()
                process.wait()


def _start(words: list[str], log: Path) -> subprocess.Popen:
    """Starts `train` with these arguments; its output goes to the file `log`."""
    command = [sys.executable, "-m", "latent_delib.train", *words]
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def _verdict(setting: Setting, code: int, workdir: Path) -> Verdict:
    """Reads the verdict of a dry run that has ended, and prints it."""
    name = " ".join(setting.flags)
    if code == 0:
        result = json.loads((workdir / "dry_run.json").read_text())
        print(f"fits, {gib(result['memory']['total'])}: {name}", flush=True)
        return Verdict(setting, result, None)
    lines = (workdir / "log").read_text(errors="replace").splitlines()
    last = lines[-1].removeprefix("error: ") if lines else ""
    if not last.startswith("does not fit"):
        raise UserError(f"--search: the dry run of {name} ended with exit code {code}: {last}")
    error = last.partition(";")[0]
    print(f"{error}: {name}", flush=True)
    return Verdict(setting, None, error)


# What is printed and written.


def row(each: Estimate, result: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a setting that fits."""
    return {
        "flags": each.setting.flags,
        "mesh": result["mesh"],
        "accumulation": each.setting.accumulation,
        "remat": each.setting.remat,
        "memory": result["memory"]["total"],
        "memory_limit": result["memory_limit"],
        "received": each.received,
        "seconds": each.seconds,
    }


def show(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown, and the flags of the first."""
    axes = " x ".join(rows[0]["mesh"])
    limit = gib(rows[0]["memory_limit"])
    head = [axes, "accumulation", "remat", f"memory, of {limit}", "received", "estimated step, s"]
    lines = []
    for one in rows:
        cells = [
            " x ".join(map(str, one["mesh"].values())),
            str(one["accumulation"]),
            one["remat"],
            gib(one["memory"]),
            gib(one["received"]),
            f"{one['seconds']:.3g}",
        ]
        lines.append(cells)
    flags = " ".join(rows[0]["flags"])
    return f"{markdown(head, lines)}\nthe first, as flags:\n{flags}"
