"""Writes the metrics of a training job: to the screen, metrics.jsonl, TensorBoard and W&B."""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from latent_delib.errors import UserError, store_errors
from latent_delib.job import estimate
from latent_delib.job.experiment import Experiment
from latent_delib.job.wandb_run import WandbRun
from latent_delib.machine import chips, files
from latent_delib.machine.progress import hours
from latent_delib.machine.workdir import is_remote


@dataclasses.dataclass
class Mean:
    """Adds up the loss of steps, in nats, and their tokens."""

    nats: float = 0.0
    tokens: float = 0.0

    def add(self, loss: float, tokens: float) -> None:
        self.nats += loss * tokens
        self.tokens += tokens

    def value(self) -> float | None:
        """Returns the mean loss, in nats per token; None without a token."""
        return self.nats / self.tokens if self.tokens else None


class Metrics:
    """Collects the values of a run's steps; process 0 writes a row per `train.log_every` steps.

    A step's values are the same on all processes. They are read after the next step is dispatched,
    so the device never waits for the host.

    Args:
      start: the step from which the run continues.
      learning_rate: the optimizer's learning rate, as a function of the steps done.
    """

    def __init__(
        self, exp: Experiment, workdir: str, start: int, learning_rate: Callable[[int], Any]
    ):
        c = exp.config
        t = c.train
        self.log_every = t.log_every
        self.steps = t.steps
        self.allowed = t.max_bad_steps
        self.prompt_end = f"config.method.prompt_end={c.method.prompt_end!r}"
        if exp.steps_end:
            self.prompt_end += " and the steps that follow"
        self.steps_between_saves = min(t.checkpoint_every, t.steps)
        # Computed now: during training the device would answer only after the step that is running.
        self.learning_rates = np.asarray(jax.vmap(learning_rate)(np.arange(t.steps)))
        self.tokens = t.batch_size * c.data.seq_len
        self.flops = estimate.device_flops(exp)["useful"]  # of a device
        self.peak = chips.chip_of(jax.devices()[0]).peak or math.nan
        self.pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
        self.predicted = False  # whether any step had tokens to predict
        self.bad = 0
        self.grad_norm = math.nan
        self.since_save = Mean()
        self.saved = start
        self.logs: list[Log | WandbRun] = []
        if jax.process_index() == 0:
            self.logs.append(Log(workdir, start))
        if jax.process_index() == 0 and t.wandb:
            self.logs.append(WandbRun(t.wandb, workdir, exp.record.config))
        self.begin_row(start)

    def begin_row(self, step: int) -> None:
        """Starts the clock of the steps after `step`."""
        self.since_row = Mean()
        self.held_out: dict[str, float] = {}
        self.waited = 0.0
        self.row_begin = step
        self.clock = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self, values: Any) -> Iterator[None]:
        """Waits for a step's `values`, then stops the clock while the block runs."""
        self.flush()  # its row must not have the time of this step
        jax.block_until_ready(values)
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def push(
        self, step: int, values: dict[str, jax.Array], held_out: dict[str, float] | None = None
    ) -> None:
        """Takes a step's values, and reads the values of the step before.

        Args:
          held_out: figures of held-out text, where the step has some; they go into its row.
        """
        self.flush()
        self.pending = (step, values, held_out or {})

    def flush(self) -> None:
        """Reads the values that are pending.

        Raises:
          UserError: loss or gradient is not finite, and `train.max_bad_steps` steps were skipped
            before; or the text has had nothing to predict since the job began.
        """
        if self.pending is None:
            return
        step, values, held_out = self.pending
        self.pending = None
        loss = float(values["loss"])
        tokens = float(values["tokens"])
        grad_norm = float(values["grad_norm"])
        # The loss is of the weights before the update; the gradient makes the weights after it.
        if math.isfinite(loss + grad_norm):
            self.since_row.add(loss, tokens)
            self.since_save.add(loss, tokens)
            self.grad_norm = grad_norm
        else:
            self._skip(f"step {step}: the loss is {loss}, the gradient norm {grad_norm}")
        self.predicted |= tokens > 0
        self.held_out |= held_out  # where no row is written now, they go into the next
        if step % self.log_every and step != self.steps:
            return
        if self.since_row.tokens:
            self._write_row(step)
        elif not (self.predicted or self.saved):
            raise UserError(
                f"step {step}: no token was predicted since step {self.row_begin}: no document "
                f"has text after {self.prompt_end}; if the words stand within a line, begin "
                "prompt_end with their space"
            )

    def _skip(self, problem: str) -> None:
        """Counts a step that is not finite; raises UserError for one more than allowed."""
        self.bad += 1
        if self.bad <= self.allowed:
            if self.logs:
                print(f"{problem}; skipped, {self.bad} of at most {self.allowed}", flush=True)
            return
        if self.allowed:
            raise UserError(
                f"{problem}; expected at most config.train.max_bad_steps={self.allowed} such steps"
            )
        saved = f"step {self.saved} is saved" if self.saved else "nothing is saved yet"
        raise UserError(
            f"{problem}; {saved}; set config.train.max_bad_steps above 0, or use a lower learning "
            "rate in another --workdir"
        )

    def _write_row(self, step: int) -> None:
        """Writes the row of the steps since the last one, and prints it."""
        count = step - self.row_begin
        seconds = (time.perf_counter() - self.clock) / count
        utilisation = self.flops / seconds / self.peak
        row = {
            "step": step,
            "loss": self.since_row.value(),
            "grad_norm": self.grad_norm,
            "learning_rate": float(self.learning_rates[step - 1]),
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": self.waited / count,  # part of step_seconds: waiting for a batch
        }
        if self.allowed:
            row["bad_steps"] = self.bad
        if math.isfinite(utilisation):
            row["model_flops_utilisation"] = utilisation
        row |= self.held_out
        self.begin_row(step)  # the next row counts the time of writing this one
        for log in self.logs:
            log.write(row)
        if self.logs:
            print(line(row, self.steps), flush=True)

    def loss_to_save(self, step: int) -> float | None:
        """Returns the mean loss since the last save, in nats per token.

        It is None where every step was skipped. It is also None after fewer steps than usual,
        because such a mean must not win `train.keep_best`.
        """
        loss = self.since_save.value()
        count = step - self.saved
        self.since_save = Mean()
        self.saved = step
        return loss if count >= self.steps_between_saves else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes the logs; after an error too, because the rows before it show why."""
        for log in self.logs:
            log.close(failed=kind is not None)


def line(row: dict[str, float], steps: int) -> str:
    """Returns a row as it is printed."""
    parts = [
        f"step {row['step']}/{steps}",
        f"loss {row['loss']:.4f}",
    ]
    if "validation_loss" in row:
        parts.append(f"validation {row['validation_loss']:.4f}")
    if "validation_loss_decoder" in row:
        parts[-1] += f" (decoder {row['validation_loss_decoder']:.4f})"
    if "validation_solved" in row:
        parts.append(f"solved {row['validation_solved']:.1f} %")
    if "validation_solved_decoder" in row:
        parts[-1] += f" (decoder {row['validation_solved_decoder']:.1f} %)"
    parts += [
        f"grad {row['grad_norm']:.3f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
    ]
    if "model_flops_utilisation" in row:
        parts.append(f"MFU {row['model_flops_utilisation']:.1%}")
    parts.append(f"ETA {hours((steps - row['step']) * row['step_seconds'])}")
    return "  ".join(parts)


class Log:
    """Writes rows to WORKDIR/metrics.jsonl, and as events to WORKDIR/tensorboard.

    Rows of steps after `start` are dropped, because these steps are done again. For a workdir on
    gs:// both files are written to a temporary folder and then copied.
    """

    def __init__(self, workdir: str, start: int):
        there = epath.Path(workdir)
        lines = _lines_until(there / "metrics.jsonl", start)
        self.temporary = None
        self.folder = Path(workdir)
        if is_remote(workdir):
            self.temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self.temporary.name)
        self.path = self.folder / "metrics.jsonl"
        files.write(self.path, "".join(lines).encode())
        self.file = self.path.open("a")
        # Not SummaryWriter: on a full disk its thread ends, and its queue then blocks for ever.
        (self.folder / "tensorboard").mkdir(exist_ok=True)
        self.events = EventsWriter(str(self.folder / "tensorboard" / "events"), f".{os.getpid()}")
        # TensorBoard drops the steps from here on, which are done again.
        self._write_event(start + 1, session_log=SessionLog(status=SessionLog.START))
        self.copies = []
        if is_remote(workdir):
            written = [self.path, *self.folder.glob("tensorboard/*")]
            self.copies = [
                files.Copy(path, there / path.relative_to(self.folder)) for path in written
            ]

    def write(self, row: dict[str, float]) -> None:
        with files.path_errors(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        values = []
        for name, value in row.items():
            if name != "step":
                values.append(Summary.Value(tag=name, simple_value=value))
        self._write_event(int(row["step"]), summary=Summary(value=values))
        for copy in self.copies:
            copy.update()

    def _write_event(self, step: int, **content: Any) -> None:
        with files.path_errors(self.folder / "tensorboard"):
            self.events.write_event(Event(wall_time=time.time(), step=step, **content))
            self.events.flush()

    def close(self, failed: bool) -> None:
        """Closes the files. The rows of a failed run are kept too."""
        del failed
        self.file.close()
        self.events.close()
        for copy in self.copies:
            copy.close()
        if self.temporary is not None:
            self.temporary.cleanup()


def _lines_until(path: epath.Path, last: int) -> list[str]:
    """Returns the complete lines of a metrics.jsonl up to step `last`; none without a file."""
    with store_errors(path):
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines = []
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a kill
            if json.loads(line)["step"] <= last and line.endswith("\n"):
                lines.append(line)
    return lines
