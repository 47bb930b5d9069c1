"""Trains a method's parameters on a frozen decoder (or the decoder itself). Run again to resume.

  python -m latent_delib.train --config=configs/X.py --workdir=DIR [--config.key=value ...]
      [--distributed] [--dry_run [--topology=v5e:4x4]]

WORKDIR gets checkpoints/, metrics.jsonl, tensorboard/, and decoder/ when the decoder was trained. It may be
gs://BUCKET/PATH: there, checkpoints/ and metrics.jsonl, and nothing keeps two jobs from the same one.
Ctrl-C saves, after two more steps at most; a second one, or one before the first step, ends at once.
Exit codes: 0 done; 75 stopped by SIGTERM and saved, 69 another process or the store was lost: run again for both; 130
stopped by Ctrl-C, the last line says what is saved; 1 an error that running again does not cure.
"""

import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib import lora
from latent_delib.delib.methods import METHODS
from latent_delib.delib.step import TrainState
from latent_delib.errors import INTERRUPTED, UserError, device_memory
from latent_delib.job import build, dry_run, experiment
from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment
from latent_delib.job.metrics import Metrics
from latent_delib.machine import commands, distributed, files
from latent_delib.machine.checkpoint import Checkpoints, whole_steps
from latent_delib.machine.stopping import Stop, graceful_stop
from latent_delib.machine.workdir import exclusive, is_remote
from latent_delib.nn.transformer import Params
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
        if build.step_of_decoder(workdir) != start:
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
        architecture = exp.aug.transformer.config.to_dict()
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
                (partial_folder / build.TRAINED).write_text(json.dumps({"step": step}) + "\n")
            print(f"trained decoder: {Path(workdir) / 'decoder'}", flush=True)
        else:
            for _ in chunks:  # takes part
                pass


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
