"""Writes the metrics of a training job: to the screen, to metrics.jsonl and as TensorBoard events."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from latent_delib.delib import cost
from latent_delib.delib.step import make_optimizer
from latent_delib.errors import UserError, store_error
from latent_delib.job.experiment import Experiment
from latent_delib.machine import files
from latent_delib.machine.progress import hours
from latent_delib.machine.workdir import is_remote


class Metrics:
    """Metrics of one run. Process 0 tells of them: on the screen, in metrics.jsonl and as TensorBoard events.

    A step's values are read after the next step is dispatched, so the device never waits for the host; they are the
    same on all processes. On gs:// there is no TensorBoard.
    """

    def __init__(self, exp: Experiment, workdir: str, start: int):
        c, t = exp.config, exp.config.train
        self.every, self.steps, self.allowed = t.log_every, t.steps, t.max_bad_steps
        self.schedule = make_optimizer(c.optimizer, t.steps).learning_rate
        self.tokens = t.batch_size * c.data.seq_len
        self.flops = cost.train_step_flops(
            exp.aug, t.batch_size, c.data.seq_len, c.method.num_traces, c.method.num_ahead
        )
        self.peak = cost.PEAK.get(jax.devices()[0].device_kind, math.nan) * jax.device_count()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.since_row, self.since_save = [0.0, 0.0], [0.0, 0.0]  # sums: nats, tokens
        self.bad, self.grad_norm, self.waited = 0, math.nan, 0.0
        self.since, self.clock, self.saved = start, time.perf_counter(), start
        self.primary, self.file, self.events = jax.process_index() == 0, None, None
        if self.primary:
            self.path = epath.Path(workdir) / "metrics.jsonl"
            lines = _lines(self.path, start)
            if is_remote(workdir):
                self.file = files.StoredLines(self.path, lines)
            else:
                files.write(self.path, "".join(lines).encode())
                self.file = self.path.open("a")
                # Not SummaryWriter: its thread ends where the disk is full, and its queue then blocks for ever.
                (Path(workdir) / "tensorboard").mkdir(exist_ok=True)
                self.events = EventsWriter(str(Path(workdir) / "tensorboard" / "events"), f".{os.getpid()}")
                self.event(start + 1, session_log=SessionLog(status=SessionLog.START))  # forget what is done again

    def push(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's values and reads those of the step before."""
        self.flush()
        self.pending = (step, values)

    def flush(self) -> None:
        """Reads what is pending; raises if its loss is not finite, unless that many steps may be skipped."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        loss, tokens, grad_norm = (float(values[k]) for k in ("loss", "tokens", "grad_norm"))
        if math.isfinite(loss + grad_norm):  # the loss is that before the update, which the gradient makes
            for sums in (self.since_row, self.since_save):
                sums[0] += loss * tokens
                sums[1] += tokens
            self.grad_norm = grad_norm
        else:
            self.bad += 1
            self.skip(f"step {step}: the loss is {loss}, the gradient norm {grad_norm}")
        if (step % self.every == 0 or step == self.steps) and self.since_row[1]:
            self.log(step)

    def skip(self, what: str) -> None:
        """Counts a step that changed nothing; raises where it was one too many, or did change something."""
        if self.bad > self.allowed:
            self.close()  # the rows before it show why
        if not self.allowed:
            saved = f"step {self.saved} is saved" if self.saved else "nothing is saved yet"
            raise UserError(f"{what}; {saved}; expected a lower learning rate, or config.train.max_bad_steps above 0")
        if self.bad > self.allowed:
            raise UserError(f"{what}; config.train.max_bad_steps={self.allowed} such steps were skipped before it")
        if self.primary:
            print(f"{what}; skipped, {self.bad} of at most {self.allowed}", flush=True)

    def log(self, step: int) -> None:
        """Writes one row, of the steps since the last."""
        seconds = (time.perf_counter() - self.clock) / (step - self.since)
        row = {
            "step": step,
            "loss": self.since_row[0] / self.since_row[1],
            "grad_norm": self.grad_norm,
            "learning_rate": float(self.schedule(step - 1)),
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": self.waited / (step - self.since),  # of these, waiting for a batch
        }
        if self.allowed:
            row["bad_steps"] = self.bad
        utilisation = self.flops / seconds / self.peak
        if math.isfinite(utilisation):
            row["model_flops_utilisation"] = utilisation
        if self.primary:
            self.write(row)
            mfu = f"  MFU {utilisation:.1%}" if math.isfinite(utilisation) else ""
            print(
                f"step {step}/{self.steps}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}"
                f"  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"
                f"  ETA {hours((self.steps - step) * seconds)}",
                flush=True,
            )
        self.since_row, self.waited = [0.0, 0.0], 0.0
        self.since, self.clock = step, time.perf_counter()

    def write(self, row: dict[str, float]) -> None:
        with files.named(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.events is None:
            return
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        self.event(int(row["step"]), summary=Summary(value=values))

    def event(self, step: int, **content: Any) -> None:
        with files.named(self.path.parent / "tensorboard"):
            self.events.write_event(Event(wall_time=time.time(), step=step, **content))
            self.events.flush()

    def loss_since_save(self) -> float | None:
        """Returns the mean loss, in nats per token, since this was asked last; None where every step was skipped."""
        (loss, tokens), self.since_save = self.since_save, [0.0, 0.0]
        return loss / tokens if tokens else None

    def close(self) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()
        if self.events is not None:
            self.events.close()


def _lines(path: epath.Path, last: int) -> list[str]:
    """Returns the whole lines of a metrics.jsonl up to a step; those after it are done again."""
    lines = []
    try:
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    except Exception as error:  # a store's client raises what it likes
        raise store_error(error, path) or error from None
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= last and line.endswith("\n"):
                lines.append(line)
    return lines
