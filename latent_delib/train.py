"""Trains a method's parameters on a frozen decoder (or the decoder itself). Run again to resume.

  python -m latent_delib.train --config=configs/X.py --workdir=DIR [--config.key=value ...]
      [--distributed] [--dry_run [--topology=v5e:4x4]]

WORKDIR gets checkpoints/, metrics.jsonl, tensorboard/, and decoder/ when the decoder was trained. It may be
gs://BUCKET/PATH: there, checkpoints/ and metrics.jsonl, and nothing keeps two jobs from the same one.
Ctrl-C saves, after two more steps at most; a second one, or one before the first step, ends at once.
Exit codes: 0 done; 75 stopped by SIGTERM and saved, 69 another process or the store was lost: run again for both; 130
stopped by Ctrl-C, the last line says what is saved; 1 an error that running again does not cure.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from latent_delib import commands, distributed, dry_run, experiment, files, flops, models
from latent_delib import mesh as mesh_lib
from latent_delib import plan as planning
from latent_delib.checkpoint import Checkpoints, whole_steps
from latent_delib.data import batches
from latent_delib.delib import lora
from latent_delib.delib.methods import METHODS
from latent_delib.errors import INTERRUPTED, UserError, device_memory, reason, store_error
from latent_delib.experiment import Experiment
from latent_delib.nn.transformer import Params
from latent_delib.progress import hours
from latent_delib.step import TrainState, learning_rate
from latent_delib.stopping import Stop, graceful_stop
from latent_delib.weights import folder

OTHERWISE = "use that, or another --workdir"
MORE_MEMORY = (
    "lower config.train.batch_size or config.data.seq_len, raise config.train.accumulation or config.mesh.fsdp, "
    "or set config.compute.remat=full"
)


def main(flags: Any) -> None:
    if flags.dry_run or flags.topology:
        dry_run.dry_run(flags.config, flags.workdir, flags.topology)
        return
    with distributed.job(flags):
        code = train(flags.config, flags.workdir, ctrl_c=True)
    if code:
        sys.exit(code)


def train(config: ConfigDict, workdir: str, ctrl_c: bool = False) -> int:
    """Runs the job to its last step, or until a SIGTERM to any of its processes, which saves; returns the exit code.

    With `ctrl_c`, Ctrl-C does as SIGTERM does, and may end the process.

    Raises:
      UserError: anything wrong with config, data, decoder or workdir, before training starts; a loss that is not
        finite, with its step.
      OSError: the disk failed; the last checkpoint is whole.
    """
    batches.check(config.data, "sources")
    exp = experiment.read(config)
    if is_remote(workdir) and (METHODS[config.method.name].trains_decoder or config.train.profile_at):
        raise UserError(f"--workdir={workdir}: a trained decoder and a profile are written to local folders only")
    with exclusive(workdir), graceful_stop(ctrl_c) as stop, device_memory(MORE_MEMORY):
        stop.saved = lambda: max(whole_steps(workdir), default=0)
        return run(exp, workdir, stop)


def run(exp: Experiment, workdir: str, stop: Stop) -> int:
    """Runs the job itself; on many hosts every process does so, with its own rows of each batch."""
    config, mesh = exp.config, exp.mesh
    t, primary = config.train, jax.process_index() == 0
    say = partial(print, flush=True) if primary else lambda *_: None
    tokenizer_path = str(exp.tokenizer.path)

    # Shapes, then shardings, then sharded arrays: nothing ever stands unsharded on one device.
    plan = planning.make(exp)
    say(planning.summary(exp, plan))

    data = batches.fingerprint(config.data, tokenizer_path=tokenizer_path)
    plain = json.loads(config.to_json_best_effort())
    distributed.check_same(config=json.dumps(plain), decoder=exp.fingerprint, data=json.dumps(data))

    def check(meta: dict[str, Any]) -> None:
        exp.check_same(meta, workdir)
        was = meta["config"]
        for key, there, here in (
            ("seed", meta["data"]["seed"], config.seed),
            ("train.batch_size", was["train"]["batch_size"], t.batch_size),
            ("data.weights", was["data"]["weights"], plain["data"]["weights"]),
            ("data.seq_len", was["data"]["seq_len"], config.data.seq_len),
        ):
            if there != here:
                raise UserError(f"config.{key}={here}: {workdir} was started with {there}; {OTHERWISE}")
        batches.check_fingerprint(meta["data"]["fingerprint"], data)
        for room in ("method", "optimizer"):
            for name, there in was[room].items():
                if (here := plain[room].get(name)) != there:
                    raise UserError(f"config.{room}.{name}={here}: {workdir} was started with {there}; {OTHERWISE}")

    checkpoints = Checkpoints(workdir, t.keep, t.keep_every, t.keep_best)
    found = checkpoints.restore_newest(plan.state.trainable, plan.state.opt_state, check=check)
    start = found.step if found else 0
    if start >= t.steps:
        if models.step_of_decoder(workdir) != start:
            export_decoder(exp, workdir, start, found.trainable, None)
        say(f"done: step {start} of {workdir}")
        return 0
    if found:
        say(f"resuming {workdir} at step {start}")
        if (before := found.meta["config"]["train"]["steps"]) != t.steps:
            say(f"of {t.steps} steps, once of {before}: the learning rate goes on where it would be by now")
    begins = exp.start and (config.method.lora_rank or not found)  # what was trained in whole no longer needs its start
    if begins:
        experiment.open_start(exp).close()

    loader = batches.train_batches(  # before the compile, because it finds what is wrong with the data
        config.data,
        batch_size=t.batch_size,
        seed=config.seed,
        tokenizer_path=tokenizer_path,
        rows=mesh_lib.local_rows(mesh, t.batch_size),
        start_step=start,
    )
    began = time.perf_counter()
    compiled = planning.compile_step(exp, plan)
    say(f"compiled in {time.perf_counter() - began:.1f} s")

    decoder = experiment.load_decoder(exp, exp.dtype if "decoder" in plan.frozen else jnp.float32)
    begun = experiment.load_start(exp, exp.dtype if config.method.lora_rank else jnp.float32) if begins else None
    frozen = {room: tree for room, tree in (("decoder", decoder), ("coprocessor", begun)) if room in plan.frozen}
    if found:
        trainable, opt_state = found.trainable, found.optimizer
    else:
        shardings = planning.shardings_of(plan.state)
        key = jax.random.key(config.seed)
        trainable = jax.jit(experiment.init_trainable(exp), out_shardings=shardings.trainable)(key, decoder, begun)
        opt_state = jax.jit(plan.tx.init, out_shardings=shardings.opt_state)(trainable)
    del decoder, begun, found
    state = TrainState(jax.device_put(np.int32(start), mesh_lib.replicated(mesh)), trainable, opt_state)
    del trainable, opt_state

    def save(step: int, loss: float | None) -> None:
        position = {"seed": config.seed, "fingerprint": data}
        architecture = dataclasses.asdict(exp.aug.transformer.config)
        meta = exp.identity() | {"step": step, "data": position, "config": plain, "architecture": architecture}
        checkpoints.save(step, state.trainable, state.opt_state, meta, loss)

    metrics, vote = Metrics(exp, workdir, start), distributed.vote(mesh)
    stop.steps = True
    for step in range(start + 1, t.steps + 1):
        began = time.perf_counter()
        local = next(loader)
        metrics.waited += time.perf_counter() - began
        asked = vote(bool(stop.by))  # dispatched before the step, so known when the step before is done
        state, values = compiled(state, frozen, mesh_lib.place_rows(mesh, local, t.batch_size))
        metrics.push(step, values)
        if t.profile_at > start and step in (t.profile_at, t.profile_at + 3):
            jax.block_until_ready(values)  # a trace begins and ends between steps
            if primary and step == t.profile_at:
                jax.profiler.start_trace(str(Path(workdir) / "profile"))
            elif primary:
                jax.profiler.stop_trace()
        stopping = bool(asked)  # the same on all processes
        if stopping or step % t.checkpoint_every == 0 or step == t.steps:
            metrics.flush()  # a loss that is not finite must end the run before it is saved
            loss, steps, metrics.saved = metrics.loss_since_save(), step - metrics.saved, step
            save(step, loss if steps >= min(t.checkpoint_every, t.steps) else None)  # of few steps is no best one
        if stopping and step < t.steps:
            break
    metrics.close()
    checkpoints.close()
    stop.steps = False
    if step < t.steps:
        by = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}.get(stop.by, "a signal to another process")
        code = INTERRUPTED if stop.by == signal.SIGINT else commands.STOPPED
        say(f"stopped by {by}; step {step} is saved, the same command resumes")
        return code
    export_decoder(exp, workdir, step, state.trainable, frozen.get("decoder"))
    say(f"done: step {step} of {workdir}")
    return 0


def export_decoder(exp: Experiment, workdir: str, step: int, trainable: Params, frozen: Params | None) -> None:
    """Writes the decoder where that was trained, in whole or by adapters of the frozen one (None: not read yet). One
    leaf at a time is whole, on every device."""
    primary = jax.process_index() == 0
    if "decoder" in trainable:
        tree = trainable["decoder"]
        if "embedding" not in tree:
            below = jax.tree.map(lambda x: x.astype(jnp.float32), frozen or experiment.load_decoder(exp, exp.dtype))
            tree = jax.jit(lora.lay_over)(below, tree)
        leaves, dtype = folder.by_name(tree), jnp.dtype(exp.config.decoder.export_dtype)
        whole = jax.jit(lambda x: x.astype(dtype), out_shardings=mesh_lib.replicated(exp.mesh))
        chunks = (np.asarray(whole(leaf)) for leaf in leaves.values())
        if primary:
            with files.whole(Path(workdir) / "decoder", replace=True) as partial_folder:
                folder.copy_tokenizer(exp.tokenizer.path, partial_folder)
                entries = {name: (leaf.shape, dtype) for name, leaf in leaves.items()}
                folder.write_model(partial_folder, exp.aug.transformer.config, entries, chunks)
                (partial_folder / models.TRAINED).write_text(json.dumps({"step": step}) + "\n")
            print(f"trained decoder: {Path(workdir) / 'decoder'}", flush=True)
        else:
            for _ in chunks:  # takes part
                pass


class Metrics:
    """Metrics of one run. Process 0 tells of them: on the screen, in metrics.jsonl and as TensorBoard events.

    A step's values are read after the next step is dispatched, so the device never waits for the host; they are the
    same on all processes. On gs:// there is no TensorBoard.
    """

    def __init__(self, exp: Experiment, workdir: str, start: int):
        c, t = exp.config, exp.config.train
        self.every, self.steps, self.allowed = t.log_every, t.steps, t.max_bad_steps
        self.schedule = learning_rate(c.optimizer, t.steps)
        self.tokens = t.batch_size * c.data.seq_len
        self.flops = flops.train_step_flops(
            exp.aug, t.batch_size, c.data.seq_len, c.method.num_traces, c.method.num_ahead
        )
        self.peak = flops.PEAK.get(jax.devices()[0].device_kind, math.nan) * jax.device_count()
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


def is_remote(workdir: str) -> bool:
    return workdir.startswith("gs://")


@contextlib.contextmanager
def exclusive(workdir: str) -> Iterator[None]:
    """Holds a local workdir for one job; the lock is process 0's, and ends with it, however that ends."""
    if is_remote(workdir) or jax.process_index():
        yield
        return
    if ":/" in workdir:
        raise UserError(f"--workdir={workdir}: expected a local directory or gs://BUCKET/PATH")
    try:
        files.make_folder(Path(workdir))
        lock = open(Path(workdir) / ".lock", "a+")
    except (UserError, OSError) as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({reason(error)})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(f"--workdir={workdir}: in use by another job (process {lock.read().strip()})") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(commands.CONFIG, "a file under configs/"),
        workdir=(commands.REQUIRED, "where the job writes"),
        dry_run=(False, "compile the step, say what it needs, write that to dry_run.json; nothing is run"),
        topology=(
            "",
            "the TPU slice to compile for in a dry run: v5e:4x4, v5p:4x4x4, v6e:16x16, ...; here if left out",
        ),
        **distributed.FLAGS,
    )
