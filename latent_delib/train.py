"""Trains a method's parameters on a frozen decoder (or the decoder itself). Run again to resume.

  python -m latent_delib.train --config=configs/X.py --workdir=DIR [--config.key=value ...] [--dry_run]

WORKDIR gets checkpoints/, metrics.jsonl, tensorboard/, and decoder/ when the decoder was trained.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from latent_delib import commands, experiment, flops
from latent_delib import mesh as mesh_lib
from latent_delib.checkpoint import Checkpoints
from latent_delib.data import batches
from latent_delib.errors import UserError
from latent_delib.experiment import Experiment
from latent_delib.nn.transformer import PARAM_AXES, Params
from latent_delib.step import TrainState, learning_rate, make_optimizer, train_step
from latent_delib.weights import folder


def main(flags: Any) -> None:
    train(flags.config, flags.workdir, flags.dry_run)


def train(config: ConfigDict, workdir: str, dry_run: bool = False) -> None:
    """Runs the job to its last step, or until SIGTERM, which saves and returns.

    Raises:
      UserError: anything wrong with config, data, decoder or workdir, before training starts; a loss that is not
        finite, with its step.
      OSError: the disk failed; the last checkpoint is whole.
    """
    exp = experiment.read(config)
    if dry_run:
        return run(exp, None, None)
    with exclusive(Path(workdir)), graceful_stop() as stop:
        run(exp, Path(workdir), stop)


def run(exp: Experiment, workdir: Path | None, stop: dict[str, bool] | None) -> None:
    """The job itself; without a workdir it ends after the summary."""
    config, mesh = exp.config, exp.mesh
    t, primary = config.train, jax.process_index() == 0
    say = partial(print, flush=True) if primary else lambda *_: None

    # Shapes, then shardings, then sharded arrays: nothing ever stands unsharded on one device.
    tx = make_optimizer(config.optimizer, t.steps)
    init = experiment.init_trainable(exp)
    decoder_shapes = folder.shapes(exp.aug.transformer.config)
    trainable_shapes = jax.eval_shape(init, jax.random.key(0), decoder_shapes)
    state_shapes = jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, tx.init(p)), trainable_shapes)
    shardings = state_shardings(exp, tx, state_shapes)
    frozen_shapes = {} if "decoder" in trainable_shapes else {"decoder": cast(decoder_shapes, exp.dtype)}
    frozen_shardings = mesh_lib.parameters(mesh, frozen_shapes, PARAM_AXES)

    step_function = jax.jit(
        partial(
            train_step,
            aug=exp.aug,
            tx=tx,
            seed=config.seed,
            num_traces=config.method.num_traces,
            num_ahead=config.method.num_ahead,
            accumulation=t.accumulation,
            dtype=exp.dtype,
        ),
        out_shardings=(shardings, mesh_lib.replicated(mesh)),
        donate_argnums=0,
    )
    row = jax.ShapeDtypeStruct((t.batch_size, config.data.seq_len), jnp.int32, sharding=mesh_lib.rows(mesh))
    say(summary(exp, state_shapes, frozen_shapes, shardings))

    checkpoints, meta, start, loader = None, None, 0, None
    if workdir is not None:
        checkpoints = Checkpoints(str(workdir), t.keep)
        if (latest := checkpoints.latest()) is not None:
            meta = checkpoints.meta(latest)
            exp.check_same(meta, str(workdir))
            start = meta["step"]
        if start < t.steps:  # before the compile, because it finds what is wrong with the data
            loader = batches.train_batches(
                config.data,
                batch_size=t.batch_size,
                seed=config.seed,
                tokenizer_path=str(exp.tokenizer.path),
                host=jax.process_index(),
                num_hosts=jax.process_count(),
                start_step=start,
            )

    began = time.perf_counter()
    compiled = step_function.lower(
        with_shardings(state_shapes, shardings),
        with_shardings(frozen_shapes, frozen_shardings),
        {"tokens": row, "segment": row},
    ).compile()
    if (memory := compiled.memory_analysis()) is not None:
        held, working = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        say(f"compiled in {time.perf_counter() - began:.1f} s: {gib(held)} held + {gib(working)} working per device")
    if workdir is None or checkpoints is None or stop is None:
        return

    decoder = experiment.load_decoder(exp, jnp.float32 if "decoder" in trainable_shapes else exp.dtype)
    frozen = {"decoder": decoder} if frozen_shapes else {}
    if meta is None:
        trainable = jax.jit(init, out_shardings=shardings.trainable)(jax.random.key(config.seed), decoder)
        opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trainable)
    else:
        say(f"resuming {workdir} at step {start}")
        trainable, opt_state = checkpoints.restore(
            start,
            with_shardings(trainable_shapes, shardings.trainable),
            with_shardings(state_shapes.opt_state, shardings.opt_state),
        )
    del decoder
    state = TrainState(jax.device_put(np.int32(start), mesh_lib.replicated(mesh)), trainable, opt_state)

    def save(step: int) -> None:
        position = {"seed": config.seed, "step": step}
        plain = json.loads(config.to_json_best_effort())
        architecture = dataclasses.asdict(exp.aug.transformer.config)
        saved = exp.identity() | {"step": step, "data": position, "config": plain, "architecture": architecture}
        checkpoints.save(step, state.trainable, state.opt_state, saved)

    if loader is not None:
        metrics = Metrics(exp, workdir if primary else None, start, frozen_decoder=bool(frozen_shapes))
        last_saved = start if meta is not None else None
        for step in range(start + 1, t.steps + 1):
            began = time.perf_counter()
            local = next(loader)
            metrics.waited += time.perf_counter() - began
            batch = {k: jax.make_array_from_process_local_data(mesh_lib.rows(mesh), v) for k, v in local.items()}
            state, values = compiled(state, frozen, batch)
            metrics.push(step, values)
            if t.profile_at > start and step in (t.profile_at, t.profile_at + 3):
                jax.block_until_ready(values)  # a trace begins and ends between steps
                if step == t.profile_at:
                    jax.profiler.start_trace(str(workdir / "profile"))
                else:
                    jax.profiler.stop_trace()
            stopping = stop["requested"]
            if stopping or step % t.checkpoint_every == 0 or step == t.steps:
                metrics.flush()  # a loss that is not finite must end the run before it is saved
                save(step)
                last_saved = step
            if stopping:
                break
        metrics.close()
        checkpoints.wait()
        if last_saved != t.steps:
            say(f"stopped by SIGTERM; step {last_saved} is saved, the same command resumes")
            checkpoints.close()
            return
    checkpoints.close()
    if "decoder" in trainable_shapes and primary:
        export = jax.tree.map(lambda x: np.asarray(x.astype(config.decoder.export_dtype)), state.trainable["decoder"])
        write_tokenizer = partial(folder.copy_tokenizer, exp.tokenizer.path)
        folder.save(workdir / "decoder", exp.aug.transformer.config, export, write_tokenizer)
        say(f"trained decoder: {workdir / 'decoder'}")
    say(f"done: step {t.steps} of {workdir}")


class Metrics:
    """Metrics of one run: a progress line, metrics.jsonl and TensorBoard events.

    A step's values are read after the next step is dispatched, so the device never waits for the host.
    """

    def __init__(self, exp: Experiment, workdir: Path | None, start: int, frozen_decoder: bool):
        c, t = exp.config, exp.config.train
        self.every, self.steps = t.log_every, t.steps
        self.schedule = learning_rate(c.optimizer, t.steps)
        self.tokens = t.batch_size * c.data.seq_len
        self.flops = flops.train_step_flops(
            exp.aug, t.batch_size, c.data.seq_len, c.method.num_traces, c.method.num_ahead, frozen_decoder
        )
        self.peak = flops.PEAK.get(jax.devices()[0].device_kind, math.nan) * jax.device_count()
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.loss, self.weight, self.waited = 0.0, 0.0, 0.0
        self.since, self.clock = start, time.perf_counter()
        self.file, self.events = None, None
        if workdir is not None:
            path = workdir / "metrics.jsonl"
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
            path.with_suffix(".tmp").write_text("".join(line + "\n" for line in kept))
            path.with_suffix(".tmp").replace(path)  # steps after the checkpoint are done again
            self.file = path.open("a")
            self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def push(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's values and reads those of the step before."""
        self.flush()
        self.pending = (step, values)

    def flush(self) -> None:
        """Reads what is pending; raises if its loss is not finite."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        loss, tokens, grad_norm = (float(values[k]) for k in ("loss", "tokens", "grad_norm"))
        if not math.isfinite(loss + grad_norm):  # the loss is that before the update, which the gradient makes
            raise UserError(
                f"step {step}: the loss is {loss}, the gradient norm {grad_norm}; the last checkpoint is from before it"
            )
        self.loss += loss * tokens
        self.weight += tokens
        if step % self.every and step != self.steps:
            return
        seconds = (time.perf_counter() - self.clock) / (step - self.since)
        row = {
            "step": step,
            "loss": self.loss / max(self.weight, 1.0),
            "grad_norm": grad_norm,
            "learning_rate": float(self.schedule(step - 1)),
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": self.waited / (step - self.since),  # of these, waiting for a batch
        }
        utilisation = self.flops / seconds / self.peak
        if math.isfinite(utilisation):
            row["model_flops_utilisation"] = utilisation
        if self.file is not None and self.events is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            for name in row.keys() - {"step"}:
                self.events.add_scalar(name, row[name], step)
            eta = time.strftime("%H:%M:%S", time.gmtime((self.steps - step) * seconds))
            mfu = f"  MFU {utilisation:.1%}" if math.isfinite(utilisation) else ""
            print(
                f"step {step}/{self.steps}  loss {row['loss']:.4f}  grad {grad_norm:.3f}  lr {row['learning_rate']:.2e}"
                f"  {row['tokens_per_second']:,.0f} tokens/s{mfu}  ETA {eta}",
                flush=True,
            )
        self.loss, self.weight, self.waited = 0.0, 0.0, 0.0
        self.since, self.clock = step, time.perf_counter()

    def close(self) -> None:
        self.flush()
        if self.file is not None and self.events is not None:
            self.file.close()
            self.events.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a JSON-lines file; a line cut short by a kill is dropped."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def state_shardings(exp: Experiment, tx: optax.GradientTransformation, shapes: TrainState) -> TrainState:
    """Every optimizer leaf lies like its parameter; what belongs to no parameter is replicated."""
    trainable = mesh_lib.parameters(exp.mesh, shapes.trainable, PARAM_AXES)
    whole = mesh_lib.replicated(exp.mesh)
    opt_state = optax.tree.map_params(
        tx, lambda _, sharding: sharding, shapes.opt_state, trainable, transform_non_params=lambda _: whole
    )
    return TrainState(whole, trainable, opt_state)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def cast(shapes: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def summary(exp: Experiment, state: TrainState, frozen: Params, shardings: TrainState) -> str:
    """What is about to run, in a few lines."""
    c, m = exp.config, exp.config.method

    def count(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    shapes = f"B {c.train.batch_size} T {c.data.seq_len}"
    if exp.aug.has_latents:
        shapes += f" M {m.num_traces} L {m.num_latents} A {m.num_ahead}, placement {m.placement}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(exp.mesh.shape)}"
    lines = [
        f"method {m.name}: {shapes}, {c.compute.dtype}, attention {exp.aug.transformer.form}, remat {c.compute.remat}",
        f"decoder {exp.decoder or 'random'} [{exp.fingerprint[:12]}]",
        f"parameters: {count(frozen):,} frozen ({gib(size(frozen))}), {count(state.trainable):,} trainable "
        f"({gib(size(state.trainable))} + optimizer {gib(size(state.opt_state))}), over all devices",
        f"devices: {devices}",
        f"trainable parameters and where they lie:\n{mesh_lib.table(shardings.trainable, state.trainable)}",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds a workdir for one job; the lock ends with the process, however it ends."""
    if ":/" in str(workdir):
        raise UserError(f"--workdir={workdir}: expected a local directory")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from None
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


@contextlib.contextmanager
def graceful_stop() -> Iterator[dict[str, bool]]:
    """Turns SIGTERM into a request that the loop sees after the step it is in."""
    state = {"requested": False}

    def request(*_: Any) -> None:
        state["requested"] = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield state
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(commands.CONFIG, "a file under configs/"),
        workdir=(commands.REQUIRED, "where the job writes"),
        dry_run=(False, "stop after the summary and the compile"),
    )
