"""The evaluations of a run's checkpoints, and which checkpoints are left to evaluate.

The two classes look at files and wait for no other process: they are asked on process 0 alone.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from latent_delib.errors import UserError
from latent_delib.job.record import Record
from latent_delib.machine.checkpoint import whole_steps
from latent_delib.machine.distributed import on_first, warn
from latent_delib.measure import views

POLL = 20.0  # seconds between two looks for new checkpoints


class Evaluations:
    """Reads the folder OUT/evaluations, which has a folder per step.

    record: of the evaluation that is about to be made. All in the folder must be of the same subject, because one curve
    goes through them.
    """

    def __init__(self, folder: epath.Path, record: Record):
        self.folder = folder
        self.record = record

    def results(self) -> dict[int, dict[str, Any]]:
        """Reads the perplexity.json of each step that has one, by step, the smallest first."""
        results: dict[int, dict[str, Any]] = {}
        if not self.folder.exists():
            return results
        for folder in self.folder.iterdir():
            if folder.name.isdigit() and self.is_done(int(folder.name)):
                results[int(folder.name)] = json.loads(self.file(int(folder.name)).read_text())
        return dict(sorted(results.items()))

    def file(self, step: int) -> epath.Path:
        """Returns the path of a step's perplexity.json."""
        return self.folder / str(step) / "perplexity.json"

    def require_same(self) -> None:
        """Raises UserError unless all evaluations in the folder may stand on one curve with the one to be made."""
        drawn = self.record["evaluate.max_positions"] or self.record["evaluate.swap"]
        for step, result in self.results().items():
            self.record.require(Record.from_result(result), "compare", str(self.file(step)))
            if drawn and result.get("draws", 1) != views.DRAWS:
                raise UserError(
                    f"{self.file(step)}: an older version drew its positions and donors in another way; "
                    "give another --out"
                )

    def require_text(self, digest: str) -> None:
        """Raises UserError unless all evaluations in the folder are of the text with this digest."""
        for step, result in self.results().items():
            if result.get("text", digest) != digest:
                raise UserError(
                    f"{self.file(step)}: is of another text, under the same names; give another --out, or remove it"
                )

    def is_done(self, step: int) -> bool:
        """Tells whether a step is evaluated."""
        return self.file(step).exists()


class Queue:
    """Holds the checkpoints of a workdir that wait for their evaluation.

    steps: the steps that are wanted; None: every checkpoint that is there at some look.
    """

    def __init__(self, workdir: str, evaluations: Evaluations, steps: Sequence[int] | None):
        self.workdir = workdir
        self.evaluations = evaluations
        self.steps = steps
        self.waiting = set(steps or ())
        self.seen = set(steps or ())

    def require_some(self) -> None:
        """Raises UserError unless there is a checkpoint or an evaluation, and one of each wanted step."""
        there = whole_steps(self.workdir)
        done = self.evaluations.results()
        if not (there or done or self.steps):
            raise UserError(f"--workdir={self.workdir}: holds no checkpoints; train it first")
        absent = sorted(self.waiting - there - done.keys())
        if absent:
            raise UserError(f"--steps: no checkpoint of step {absent[0]}; there are {sorted(there)}")

    def require_folder(self) -> None:
        """Raises UserError unless a training has begun in the workdir."""
        if not epath.Path(self.workdir).is_dir():
            raise UserError(f"--watch: --workdir={self.workdir}: no such folder; start the training first, it makes it")

    def next(self) -> int | None:
        """Takes the smallest step that waits for its evaluation, or returns None."""
        there = whole_steps(self.workdir)
        if self.steps is None:
            self.waiting |= there - self.seen
            self.seen |= there
        for step in sorted(self.waiting):
            self.waiting.remove(step)
            if self.evaluations.is_done(step):
                continue
            if step in there:
                return step
            warn(f"{self.workdir}: checkpoint {step} was removed before its turn; skipped")
        return None

    def is_over(self, patience: float, waited: float) -> bool:
        """Tells whether no checkpoint will come, and prints why.

        Either the newest one is the last of its training, or for `patience` seconds none has come.

        Raises:
          UserError: there was none to evaluate.
        """
        newest = max(self.seen, default=-1)  # not one that came since `next` looked: it would never be evaluated
        results = self.evaluations.results()
        if results and newest >= Record.from_result(results[max(results)])["train.steps"]:
            print(f"step {newest} was the last", flush=True)
            return True
        if waited < patience:
            return False
        if not (self.seen or results):
            raise UserError(
                f"--watch: no checkpoint came to {self.workdir} in {patience:g} s, so nothing was evaluated"
            )
        print(f"no new checkpoint for {patience:g} s", flush=True)
        return True


def steps_to_evaluate(queue: Queue, patience: float | None) -> Iterator[int]:
    """Yields the steps to evaluate, the smallest first, the same on every process.

    Args:
      queue: the checkpoints of a workdir.
      patience: None: checkpoints that are there now. Otherwise new ones too, until the training's last step is done, or
        for so many seconds none has come.

    Raises:
      UserError: there is nothing to evaluate, or evaluations of something else are in the way.
    """
    on_first(queue.evaluations.require_same)
    on_first(queue.require_some if patience is None else queue.require_folder)
    since = time.monotonic()
    while True:
        step = on_first(queue.next)
        if step is not None:
            yield step
            since = time.monotonic()
            continue
        waited = time.monotonic() - since
        if patience is None or on_first(queue.is_over, patience, waited):
            return
        time.sleep(max(0.0, min(POLL, patience - waited)))
