"""Trains a method's parameters on a frozen decoder, or the decoder itself.

  python -m latent_delib.train --config=configs/X.py --workdir=DIR [--config.key=value ...]
      [--text=GLOB --held_out=GLOB] [--distributed] [--dry_run [--topology=v5e:4x4 [--search]]]

The same command resumes. WORKDIR gets checkpoints/, metrics.jsonl, tensorboard/, and decoder/ when
the decoder was trained. It may be gs://BUCKET/PATH; no lock then keeps two jobs from using it at
once. Ctrl-C saves after at most two more steps, or after the validation that is under way. A second
Ctrl-C, or one before the first step, ends the job at once.

--text and --held_out name a text of your own, to train on and to evaluate on. They are turned into
token files first, in WORKDIR/tokens.

Exit codes: 0 done; 75 stopped by SIGTERM and saved, run again; 69 another process was lost, or a
store or the Hub does not answer, run again; 134 jax ended the process because another hangs, run
again; 130 stopped by Ctrl-C, the same command resumes; 1 an error that running again does not fix.
"""

import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib import augment
from latent_delib.delib.step import TrainState
from latent_delib.errors import INTERRUPTED, UserError
from latent_delib.job import build, dry_run, experiment, own_text, parameters, search, wandb_run
from latent_delib.job import plan as planning
from latent_delib.job.checks import check_steps
from latent_delib.job.experiment import Experiment
from latent_delib.job.export import check_free, export_decoder
from latent_delib.job.metrics import Metrics
from latent_delib.job.plan import Plan
from latent_delib.job.record import Record
from latent_delib.job.validation import Validation, read_held_out
from latent_delib.machine import checkpoint, commands, distributed, files, saved_steps, seeds
from latent_delib.machine.checkpoint import Checkpoints, Restored
from latent_delib.machine.command_line import CONFIG, REQUIRED
from latent_delib.machine.stopping import Stop, graceful_stop
from latent_delib.machine.workdir import exclusive
from latent_delib.measure.answers import Answers, read_questions
from latent_delib.nn.transformer import Params
from latent_delib.weights import hub

PROFILE = Path(tempfile.gettempdir()) / f"latent_delib-profile-{os.getpid()}"
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def main(flags: Any) -> None:
    distributed.split_cores(flags.config.compute.cpu_devices)
    has_own_text = flags.text or flags.held_out
    if has_own_text:
        own_text.use_text(flags.config, flags.text, flags.held_out)
    if flags.search:
        search.search(flags.config, flags.workdir, flags.topology, sys.argv[1:])
        return
    if flags.dry_run or flags.topology:
        dry_run.dry_run(flags.config, flags.workdir, flags.topology)
        return
    if has_own_text:
        if flags.distributed:
            raise UserError(
                f"--text={flags.text}: with --distributed, run prepare first, and name its folder "
                "in config.data.token_files"
            )
        planning.make(check(flags.config, flags.workdir))  # before all of the text is tokenized
        own_text.make_tokens(flags.config, flags.workdir)
    with distributed.job(flags):
        code = train(flags.config, flags.workdir, ctrl_c=True)
    if code:
        sys.exit(code)


def train(config: ConfigDict, workdir: str, ctrl_c: bool = False) -> int:
    """Runs a job to its last step, or until a signal stops it; returns the exit code.

    A SIGTERM to any of its processes saves and stops them all.

    Args:
      config: a config in the form of configs/base.py.
      workdir: where the job writes, a local folder or gs://BUCKET/PATH.
      ctrl_c: lets Ctrl-C save and stop as SIGTERM does. A second Ctrl-C, or one before the first
        step, ends the process at once.

    Raises:
      UserError: anything wrong with config, data, decoder or workdir, before training starts; a
        loss that is not finite, with its step.
      OSError: the disk failed, or (Outage) a store or the Hub does not answer; the last checkpoint
        is whole.
    """
    batches.check(config.data, "sources")
    if config.train.validate_every:
        batches.check(config.data, "validation")
    exp = check(config, workdir)
    with exclusive(workdir), graceful_stop(ctrl_c) as stop:
        return run(exp, workdir, stop)


def check(config: ConfigDict, workdir: str) -> Experiment:
    """Returns the experiment of a config. Raises UserError for a mistake that needs no text."""
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is set: expected it unset, the optimizer is in float32")
    if workdir == "packaged" or workdir.startswith(hub.PREFIX):
        raise UserError(f"--workdir={workdir}: names a coprocessor to read; expected a folder")
    check_steps(config)
    exp = experiment.read(config)
    checkpoint.check_path(workdir)
    planning.check_dtype(exp)
    check_free(exp, workdir)
    if config.train.wandb:
        wandb_run.package()
    if exp.start and not saved_steps.is_begun(workdir):
        parameters.checked_start(exp)
    return exp


def run(exp: Experiment, workdir: str, stop: Stop) -> int:
    """Runs this process's share of a job: its own rows of each batch. Returns the exit code."""
    t = exp.config.train

    # Set up: shapes, then shardings, then sharded arrays, so that none is ever whole on a device.
    plan = planning.make(exp)
    say(planning.summary(exp, plan))
    text = batches.Training(exp.config.data, exp.tokenizer)
    say("\n".join(text.amounts(t.steps * t.batch_size)))
    record = record_with_data(exp, text)
    checkpoints = Checkpoints(workdir, t.keep, t.keep_every, t.keep_best)

    # Restore.
    restored = restore(checkpoints, plan, record, workdir)
    start_step = 0 if restored is None else restored.step
    if start_step >= t.steps:
        # A job that was killed between its last checkpoint and its end has not written the decoder.
        if build.step_of_decoder(workdir) != start_step:
            export_decoder(exp, workdir, start_step, restored.trainable)
        say(f"done: step {start_step} of {workdir}")
        return 0
    rows = mesh_lib.local_rows(exp.mesh, t.batch_size)
    loader = text.batches(
        batch_size=t.batch_size, seed=exp.config.seed, rows=rows, start_step=start_step
    )
    held_out_batches = read_held_out(exp) if t.validate_every else []
    asked = read_questions(exp) if t.validate_every else []
    state, frozen = place_state(exp, plan, restored)
    metrics = Metrics(exp, workdir, start_step, plan.optimizer.learning_rate)

    # Measure the frozen decoder, then compile the step.
    measures: list[Validation | Answers] = []
    if t.validate_every:
        measures.append(Validation(exp, plan, held_out_batches, frozen, state.trainable))
        measures.append(Answers(exp, asked, frozen))
    began = time.perf_counter()
    train_step = planning.compile_step(exp, plan)
    say(f"compiled in {time.perf_counter() - began:.1f} s")

    # Train.
    vote = distributed.vote(exp.mesh)
    stop.is_training = True
    metrics.begin_row(start_step)  # its clock starts after compiling
    with checkpoints, metrics:  # also after an error, they finish a save in progress and the logs
        for step in range(start_step + 1, t.steps + 1):
            with metrics.waiting():
                local = next(loader)
            # Start the vote before the step, so that the result is there when the step is done.
            stop_votes = vote(bool(stop.signal))
            batch = mesh_lib.place_rows(exp.mesh, local, t.batch_size)
            state, values = train_step(state, frozen, batch)
            held_out: dict[str, float] = {}
            if measures and (step % t.validate_every == 0 or step == t.steps):
                with metrics.paused(values):
                    for measure in measures:
                        held_out |= measure(state.trainable)
            metrics.push(step, values, held_out)
            if t.profile_at > start_step:
                profile_steps(t.profile_at, step, values, workdir)
            stopping = bool(stop_votes)  # the same on all processes
            if stopping or step % t.checkpoint_every == 0 or step == t.steps:
                metrics.flush()  # a loss that is not finite must end the run before it is saved
                meta = dataclasses.replace(record, step=step).meta()
                checkpoints.save(step, trees_of(state), meta, metrics.loss_to_save(step))
            if stopping:
                break
        if start_step < t.profile_at <= step < t.profile_at + 3:
            end_profile(workdir)  # the job ended before the third of the profiled steps

    # End.
    stop.is_training = False
    if step < t.steps:
        by = SIGNALS.get(stop.signal, "a signal to another process")
        say(f"stopped by {by}; step {step} is saved, the same command resumes")
        return INTERRUPTED if stop.signal == signal.SIGINT else commands.STOPPED
    export_decoder(exp, workdir, step, state.trainable, frozen.get("decoder"))
    say(f"done: step {step} of {workdir}")
    return 0


def say(line: str) -> None:
    """Prints a line once for all processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


def record_with_data(exp: Experiment, text: batches.Training) -> Record:
    """Returns the record with the data's fingerprint; all processes must have the same."""
    data = text.fingerprint()
    record = dataclasses.replace(exp.record, data=data)
    config = json.dumps(record.config)
    distributed.check_same(
        config=config,
        decoder=record.fingerprint,
        assistant=record["method.assistant"],
        data=json.dumps(data),
    )
    return record


def restore(checkpoints: Checkpoints, plan: Plan, record: Record, workdir: str) -> Restored | None:
    """Returns the newest checkpoint in the workdir, or None; it must be of the same job."""

    def check(meta: dict[str, Any]) -> None:
        there = Record.from_meta(meta, workdir)
        record.require(there, "resume", workdir)
        batches.check_fingerprint(there.data, record.data)

    restored = checkpoints.restore_newest(trees_of(plan.state), check=check)
    steps = record["train.steps"]
    if restored is None or restored.step >= steps:
        return restored
    say(f"resuming {workdir} at step {restored.step}")
    before = Record.from_meta(restored.meta, workdir)["train.steps"]
    if before != steps:
        changed = f"train.steps changed from {before} to {steps}"
        say(f"{changed}: the learning rate follows the new schedule")
    return restored


def trees_of(state: TrainState) -> dict[str, Any]:
    """Returns the trees of a checkpoint by name: of arrays, or of shapes with shardings."""
    return {"trainable": state.trainable, "optimizer": state.opt_state}


def place_state(
    exp: Experiment, plan: Plan, restored: Restored | None
) -> tuple[TrainState, Params]:
    """Returns the state to train, restored or new, and the frozen parameters, on the mesh."""
    if exp.start and (restored is None or exp.adapts_start):
        parameters.checked_start(exp)  # before anything large is loaded
    frozen = parameters.load_frozen(exp) if plan.frozen else {}
    if restored is None:
        trainable, opt_state = init_state(exp, plan, frozen)
    else:
        trainable = restored.trees["trainable"]
        opt_state = restored.trees["optimizer"]
    step = np.int32(0 if restored is None else restored.step)
    step = jax.device_put(step, mesh_lib.replicated(exp.mesh))
    return TrainState(step, trainable, opt_state), frozen


def init_state(exp: Experiment, plan: Plan, frozen: Params) -> tuple[Params, Any]:
    """Returns the trainable tree before the first step, and its optimizer state."""
    start = None
    if exp.adapts_start:
        start = {"coprocessor": frozen["coprocessor"]}
    elif exp.start:
        start = parameters.place_start(exp, jnp.float32)
    starting_decoder = augment.starting_decoder_of(frozen) if frozen else None
    if starting_decoder is None and start is None:  # the decoder's own weights are trained
        starting_decoder = parameters.place_decoder(exp, jnp.float32)
    shardings = planning.shardings_of(plan.state)
    init = parameters.init_trainable(exp.aug, exp.config.method.lora_rank)
    init = jax.jit(init, out_shardings=shardings.trainable)
    trainable = init(seeds.key(exp.config.seed), starting_decoder, start)
    init_optimizer = jax.jit(plan.optimizer.tx.init, out_shardings=shardings.opt_state)
    return trainable, init_optimizer(trainable)


def profile_steps(profile_at: int, step: int, values: Any, workdir: str) -> None:
    """Profiles the three steps after `profile_at` into WORKDIR/profile, on process 0."""
    if step not in (profile_at, profile_at + 3):
        return
    jax.block_until_ready(values)  # a profile begins and ends between steps
    if step == profile_at + 3:
        end_profile(workdir)
    elif jax.process_index() == 0:
        jax.profiler.start_trace(str(PROFILE))


def end_profile(workdir: str) -> None:
    """Ends a profile, and moves its files to WORKDIR/profile."""
    if jax.process_index() == 0:
        jax.profiler.stop_trace()
        files.upload(PROFILE, epath.Path(workdir) / "profile")
        shutil.rmtree(PROFILE)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(CONFIG, "a config file, or the name of one in configs/"),
        workdir=(REQUIRED, "where the job writes"),
        text=("", "text to train on, 'TEXT/*.txt' or any source of text; needs --held_out"),
        held_out=("", "text to evaluate on, in the same form; needs --text"),
        dry_run=(False, "compile the step, print its needs, write dry_run.json; run nothing"),
        topology=("", "the TPU slice to compile for, as v5e:4x4 or 2*v5p:4x4x4; else this machine"),
        search=(False, "compile for several meshes, and print the fastest that fit in memory"),
        **distributed.FLAGS,
    )
