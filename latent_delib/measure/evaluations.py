"""Reads the evaluations of a run's checkpoints, a folder per step; finds the steps still to do."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from latent_delib.errors import UserError, store_errors
from latent_delib.job.record import Record
from latent_delib.machine import files, saved_steps
from latent_delib.machine.distributed import on_first
from latent_delib.measure import views

POLL = 20.0  # seconds between two searches for new checkpoints


def file_of(folder: epath.Path, step: int) -> epath.Path:
    """Returns the path of a step's perplexity.json."""
    return folder / str(step) / "perplexity.json"


def read_results(folder: epath.Path) -> dict[int, dict[str, Any]]:
    """Reads the perplexity.json of each step that has one, by step, the smallest first.

    Raises:
      OSError: the disk or store fails (Outage: it does not answer).
    """
    results: dict[int, dict[str, Any]] = {}
    with store_errors(folder):
        if not folder.exists():
            return results
        names = [each.name for each in folder.iterdir()]
        for step in sorted(int(name) for name in names if name.isdigit()):
            if file_of(folder, step).exists():
                results[step] = json.loads(file_of(folder, step).read_text())
    return results


def require_same(folder: epath.Path, record: Record, text: str = "") -> None:
    """Raises UserError unless all evaluations in a folder can be compared with this record.

    text: the digest of the record's validation text, once that is known.
    """
    draws_positions = record["evaluate.max_positions"] and not record["method.prompt_end"]
    is_drawn = draws_positions or record["evaluate.swap"]
    expected = views.draws_of(record)
    for step, result in read_results(folder).items():
        file = file_of(folder, step)
        record.require(Record.from_result(result), "same_curve", str(file))
        draws = result.get("draws", 1)
        if is_drawn and draws != expected:
            raise UserError(
                f"{file}: an older version drew its random positions (scheme {draws}, now "
                f"{expected}); give another --out"
            )
        if text and result.get("text", text) != text:
            raise UserError(
                f"{file}: was made on other text of the same name; give another --out, or remove it"
            )


def require_own(folder: epath.Path, workdir: str) -> None:
    """Raises OtherRun if an evaluation in a folder is of a step of another training.

    It compares evaluations with the checkpoints that are still there and can be read.
    """
    for step, result in read_results(folder).items():
        try:
            meta = saved_steps.read_meta(workdir, step)
        except UserError:
            continue
        there = Record.from_meta(meta, workdir)
        there.require_evaluated(result, str(file_of(folder, step)))


def steps_to_evaluate(
    workdir: str, folder: epath.Path, steps: Sequence[int] | None, patience: float | None
) -> Iterator[int]:
    """Yields the steps that are not evaluated yet, the smallest first, the same on every process.

    Arguments are those of `evaluate_many`; `folder` is OUT/evaluations. Steps are tried once,
    whether or not the caller can read them.

    Raises:
      UserError: there is no checkpoint; a step of `steps` has none; none came within `patience`
        seconds.
    """
    on_first(_require_begun, workdir, folder, patience)
    tried: list[int] = []
    since = time.monotonic()
    while True:
        missing = on_first(_missing, workdir, folder, steps, tried)
        yield from missing
        if patience is None:
            return
        if missing:
            tried += missing
            since = time.monotonic()
            continue
        waited = time.monotonic() - since
        if on_first(_is_over, workdir, folder, tried, patience, waited):
            return
        time.sleep(max(0.0, min(POLL, patience - waited)))


def _require_begun(workdir: str, folder: epath.Path, patience: float | None) -> None:
    """Raises UserError unless there is a checkpoint or an evaluation, or one may still come."""
    if patience is None:
        if not (saved_steps.whole_steps(workdir) or read_results(folder)):
            raise UserError(f"--workdir={workdir}: holds no checkpoints; run train first")
    elif not files.is_folder(epath.Path(workdir)):
        raise UserError(f"--watch: --workdir={workdir}: no such folder; start the training first")


def _missing(
    workdir: str, folder: epath.Path, steps: Sequence[int] | None, tried: Sequence[int]
) -> list[int]:
    """Returns the steps to evaluate next, the smallest first; called on process 0 alone."""
    there = saved_steps.whole_steps(workdir)
    wanted = there if steps is None else set(steps)
    missing = wanted - read_results(folder).keys() - set(tried)
    absent = sorted(missing - there)
    if absent:
        raise UserError(f"--steps: no checkpoint of step {absent[0]}; there are {sorted(there)}")
    return sorted(missing)


def _is_over(
    workdir: str, folder: epath.Path, tried: Sequence[int], patience: float, waited: float
) -> bool:
    """Tells whether no checkpoint will come, and prints why; called on process 0 alone."""
    results = read_results(folder)
    newest = max([*tried, *results], default=None)
    if results and newest >= Record.from_result(results[max(results)])["train.steps"]:
        hint = "" if tried else "; if the training goes on, start this again after a checkpoint"
        print(f"step {newest} was the last{hint}", flush=True)
        return True
    if waited < patience:
        return False
    if newest is None:
        raise UserError(
            f"--watch: no checkpoint came to {workdir} in {patience:g} s, so nothing was evaluated"
        )
    print(f"no new checkpoint for {patience:g} s", flush=True)
    return True
