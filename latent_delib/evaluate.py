"""Measures perplexity of the n-th token ahead, with latents and without (Section 3.1, Table 1).

  python -m latent_delib.evaluate --workdir=DIR [--out=DIR] [--config=configs/X.py] [--distributed]
      [--step=N | --steps=all | --steps=N,N,... | --watch [--patience=SECONDS]]

Without --config it takes the config that the workdir was trained with. --config.KEY=VALUE changes a
key of either.

Prints the table and writes to OUT, by default the workdir: perplexity.json, perplexity.png, and
documents.npz with the sums of each document. With --steps or --watch these files are in
OUT/evaluations/STEP for each checkpoint, and OUT/evaluations/curves.png shows all checkpoints.
Steps that are already evaluated are skipped. --watch evaluates the checkpoints of a running
training as they appear, until its last. The same command continues a killed evaluation. The
workdir and OUT may be gs://BUCKET/PATH.
"""

import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from latent_delib.data import batches, token_files
from latent_delib.errors import Outage, UserError, store_errors
from latent_delib.job import build, experiment, own_text, parameters
from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment
from latent_delib.job.record import OtherRun, Record
from latent_delib.machine import checkpoint, commands, distributed, files, saved_steps
from latent_delib.machine.checkpoint import Restored
from latent_delib.machine.command_line import BASE, REQUIRED, load_config
from latent_delib.machine.distributed import on_first, warn
from latent_delib.machine.progress import Progress
from latent_delib.machine.provenance import provenance
from latent_delib.measure import evaluations, perplexity, views
from latent_delib.measure.perplexity import PartialSums, SumsByTerm
from latent_delib.measure.text import ValidationText, read_validation_text
from latent_delib.measure.values import jit_steps, sides_of, values_of
from latent_delib.measure.views import View
from latent_delib.nn.transformer import Params
from latent_delib.results import figures
from latent_delib.results.evaluation import as_text
from latent_delib.results.runs import Result
from latent_delib.weights import exported

SAVE_EVERY = 30.0  # seconds between two savings of partial sums
PATIENCE = 86400.0  # default of --patience


def main(flags: Any) -> None:
    asked = [flags.step is not None, bool(flags.steps), flags.watch]
    if sum(asked) > 1:
        raise UserError("--step, --steps, --watch: expected at most one")
    if flags.steps and not re.fullmatch(r"all|\d+(,\d+)*", flags.steps):
        raise UserError(f"--steps={flags.steps}: expected all, or numbers separated by commas")
    if flags.patience != PATIENCE and not flags.watch:
        raise UserError(f"--patience={flags.patience}: needs --watch")
    if flags.patience < 0:
        raise UserError(f"--patience={flags.patience}: expected at least 0")
    if exported.find_export(flags.workdir):
        where = f"--workdir={flags.workdir}: is an exported coprocessor"
        if not flags.out:
            raise UserError(f"{where}; name an --out")
        if flags.watch or flags.steps:
            raise UserError(f"{where}, of one step; leave out --steps and --watch")
    out = flags.out or flags.workdir
    distributed.split_cores(flags.config.compute.cpu_devices)
    with distributed.job(flags):
        on_first(files.check_writable, out)
        if flags.watch or flags.steps:
            steps = None
            if flags.steps not in ("", "all"):
                steps = list(map(int, flags.steps.split(",")))
            patience = flags.patience if flags.watch else None
            evaluate_many(flags.config, flags.workdir, out, steps, patience)
        else:
            evaluate(flags.config, flags.workdir, out, flags.step)


def config_of_training(flags: Any) -> ConfigDict:
    """Returns the config of a workdir's training; keys added since then have their defaults."""
    if not flags.workdir:
        raise UserError("--workdir is missing: the workdir of a training job")
    workdir = os.path.expanduser(flags.workdir)
    where = exported.find_export(workdir)
    if where is not None:
        meta = exported.read_fields(where, flags.step)["record"]
    else:
        if flags.watch and not saved_steps.whole_steps(workdir):
            raise UserError(
                f"--watch: --workdir={workdir} has no checkpoint yet that says how it is trained; "
                "give the training's --config"
            )
        meta = saved_steps.read_meta(workdir, flags.step)
    config = load_config(str(BASE))
    with config.unlocked():
        config.update(meta["config"])
    tokens = own_text.token_folder(workdir)
    if where is None and token_files.are_those_of(tokens, meta["data"]["fingerprint"]):
        config.data.token_files = tokens  # the workdir may have been moved
    return config


def evaluate(config: ConfigDict, workdir: str, out: str, step: int | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint on the config's validation sources.

    Method "decoder" with a decoder folder needs no checkpoint, unless a step is asked for: the
    frozen decoder is evaluated. Each of several processes reads all of the text and computes its
    share, and all return the same.

    Args:
      config: the config of the evaluation, with the method and decoder of the training.
      workdir: the workdir of the training.
      out: where to write.
      step: the checkpoint's step; None: the newest.

    Returns:
      The content of perplexity.json.

    Raises:
      UserError: no checkpoint, one of another decoder or method, or bad config or data.
    """
    job = Job(config, workdir, [step])
    needs_checkpoint = job.exp.aug.writes_latents or not config.decoder.path or step is not None
    found = None  # the frozen decoder alone
    if needs_checkpoint or on_first(saved_steps.is_begun, workdir):
        found = read_checkpoint(job.exp, workdir, step)
    return job.run(found, epath.Path(out))


def evaluate_many(
    config: ConfigDict,
    workdir: str,
    out: str,
    steps: Sequence[int] | None = None,
    patience: float | None = None,
) -> None:
    """Evaluates checkpoints, the smallest step first, each into OUT/evaluations/STEP.

    Args:
      config, workdir: as in `evaluate`.
      out: where to write. Steps that have a perplexity.json there are skipped.
      steps: the steps of the checkpoints; None: all.
      patience: None: evaluates the checkpoints that exist now. Otherwise evaluates new ones too,
        until the training's last step is done, or no checkpoint has come for this many seconds.

    Raises:
      UserError: errors of `evaluate`; a step of `steps` has no checkpoint; OUT has evaluations of
        another config; after all others are done, some checkpoints could not be read.
    """
    job = Job(config, workdir, [steps, patience])
    folder = epath.Path(out) / "evaluations"
    on_first(evaluations.require_same, folder, job.exp.record)
    on_first(evaluations.require_own, folder, workdir)
    done = on_first(lambda: list(evaluations.read_results(folder)))
    if done and jax.process_index() == 0:
        print(f"{folder} has the evaluations of steps {done}: they are not made again", flush=True)
    # All processes find the same damage. A disk error may be on one process alone: it ends the job.
    skipped = (UserError, OSError) if jax.process_count() == 1 else UserError
    failed = []
    for step in evaluations.steps_to_evaluate(workdir, folder, steps, patience):
        try:
            found = read_checkpoint(job.exp, workdir, step)
        except (OtherRun, Outage):
            raise
        except skipped as error:
            warn(f"checkpoint {step} is not evaluated: {error}")
            failed.append(step)
            continue
        on_first(evaluations.require_same, folder, job.exp.record, job.text.digest())
        job.run(found, folder / str(step))
        del found  # before the next checkpoint is read
        if jax.process_index() == 0:
            draw_curves(folder)
    # A running training may have removed some of them.
    failed = on_first(lambda: sorted(saved_steps.whole_steps(workdir).intersection(failed)))
    if failed:
        raise UserError(
            f"--workdir={workdir}: checkpoints {failed} could not be read; run this again, "
            "remove these checkpoints, or name the others with --steps"
        )


def read_checkpoint(exp: Experiment, workdir: str, step: int | None) -> Restored:
    """Reads a checkpoint, the newest without `step`, or an exported coprocessor.

    Its trainable tree comes in the config's dtype.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
      OtherRun: the workdir is of another decoder or method.
    """
    where = exported.find_export(workdir)
    if where is not None:
        fields, params = exported.load(where, step)
        meta = fields["record"]
        exp.record.require(Record.from_meta(meta, workdir), "evaluate", workdir)
        build.require_decoder(workdir, exp.aug.method)
        shardings = planning.shardings_of(parameters.trainable_on_mesh(exp))
        trained = jax.device_put({"coprocessor": params}, shardings)
        found = Restored(meta["step"], meta, {"trainable": trained})
    else:
        checkpoints, meta = checkpoint.open_for_reading(workdir, step)
        exp.record.require(Record.from_meta(meta, workdir), "evaluate", workdir)
        wanted = {"trainable": parameters.trainable_on_mesh(exp)}
        found = checkpoints.restore_newest(wanted, step=step)
    trainable = jax.tree.map(lambda x: x.astype(exp.dtype), found.trainable)
    return found._replace(trees={"trainable": trainable})


class Job:
    """Holds the parts that all evaluations of a job share.

    Text and weights are read when they are first needed.

    Args:
      arguments: further values that must be the same on all processes.
    """

    def __init__(self, config: ConfigDict, workdir: str, arguments: Sequence[Any]):
        batches.check(config.data, "validation")
        self.exp = experiment.read(config)
        self.workdir = workdir
        same = json.dumps([self.exp.record.config, workdir, *arguments])
        record = self.exp.record
        distributed.check_same(
            config=same, decoder=record.fingerprint, assistant=record["method.assistant"]
        )
        self.steps = jit_steps(self.exp)

    @functools.cached_property
    def text(self) -> ValidationText:
        text = read_validation_text(self.exp)
        distributed.check_same(validation=text.digest())
        return text

    @functools.cached_property
    def view(self) -> View:
        return views.view_of(self.exp, self.text)

    @functools.cached_property
    def frozen(self) -> Params:
        return parameters.load_frozen(self.exp)

    def run(self, found: Restored | None, out: epath.Path) -> dict[str, Any]:
        """Evaluates a checkpoint, or the frozen decoder if `found` is None, and writes all files.

        Returns:
          The content of perplexity.json.
        """
        text = self.text
        self.require_positions()
        partial = PartialSums(out / "partial.npz", self.identity(found))
        sums = self.add_up(found, partial)
        result = {
            **perplexity.by_source(text, sums, self.exp.config.evaluate.seed),
            "pieces": len(text.pieces),
            "draws": views.draws_of(self.exp.record),
            **self.origin(found),
            "text": text.digest(),
            "provenance": on_first(provenance),
        }
        if jax.process_index() == 0:
            write_evaluation(result, text, sums, out)
            partial.remove()
            print(as_text(result), flush=True)
        return result

    def require_positions(self) -> None:
        """Raises UserError if no piece has a position for latents, because no token would count."""
        if any(len(self.view(number).at) for number in range(len(self.text.pieces))):
            return
        c = self.exp.config
        raise UserError(
            f"config: evaluate.max_positions={c.evaluate.max_positions}, "
            f"evaluate.longer_prompt={c.evaluate.longer_prompt} and "
            f"method.prompt_end={c.method.prompt_end!r} leave no token to count; "
            "give more positions (0: all), a lower longer_prompt, another prompt_end, "
            "or longer texts"
        )

    def identity(self, found: Restored | None) -> list[Any]:
        """Returns everything that the sums depend on, as plain JSON data."""
        return [
            self.exp.record.config,
            None if found is None else [found.step, found.meta],
            self.exp.record.fingerprint,
            self.text.digest(),
            dict(self.exp.mesh.shape),
            views.draws_of(self.exp.record),
        ]

    def add_up(self, found: Restored | None, partial: PartialSums) -> SumsByTerm:
        """Adds up the values of all pieces, beginning with saved sums; saves every SAVE_EVERY s."""
        sums, done = partial.restore(perplexity.zeros(self.exp, self.text))
        sides = sides_of(self.frozen, {} if found is None else found.trainable)
        what = "evaluated" if found is None else f"checkpoint {found.step} evaluated"
        by_length = np.sort(self.text.lengths())
        tokens = np.concatenate([[0], np.cumsum(by_length)])  # by how many pieces are done
        progress = Progress(what, int(tokens[-1]), "tokens", int(tokens[done]))
        since = time.monotonic()
        for numbers in perplexity.batches_of(self.exp, self.text, self.view, done):
            cases = [self.view(number) for number in numbers]
            values = values_of(self.exp, self.steps, sides, cases)
            perplexity.add_up(self.exp, sums, self.text.document[numbers], cases, values)
            done += len(numbers)
            if jax.process_index() != 0:
                continue
            progress(int(tokens[done]))
            if time.monotonic() - since >= SAVE_EVERY:
                partial.save(sums, done)
                since = time.monotonic()
        return sums

    def origin(self, found: Restored | None) -> dict[str, Any]:
        """Returns the fields of perplexity.json that identify the run.

        Keys of training, such as the ahead tokens and `data.seq_len`, have the checkpoint's values.
        All other keys have this config's values, also `prompt_end`, `distill` and the validation
        data.
        """
        record = self.exp.record
        if found is None:
            return record.as_result(None)
        there, here = found.meta["config"], record.config
        config = {**here, **{part: there[part] for part in ("optimizer", "seed", "train")}}
        evaluated = {key: here["method"][key] for key in ("prompt_end", "distill")}
        config["method"] = there["method"] | evaluated
        config["data"] = here["data"] | {"seq_len": there["data"]["seq_len"]}
        record = dataclasses.replace(record, config=config, step=found.step)
        training = Record.from_meta(found.meta, self.workdir).digest()
        where = exported.name_of(self.workdir, found.step)
        return record.as_result(where) | {"training": training}


def write_evaluation(
    result: dict[str, Any], text: ValidationText, sums: SumsByTerm, out: epath.Path
) -> None:
    """Writes documents.npz, perplexity.png, and perplexity.json last, as a sign of completion."""
    with store_errors(out):
        (out / "perplexity.json").unlink(missing_ok=True)
    perplexity.write_documents(out / "documents.npz", text, sums)
    draw(out / "perplexity.png", figures.by_n, result["rows"])
    files.write(out / "perplexity.json", f"{json.dumps(result, indent=2)}\n".encode())


def draw_curves(folder: epath.Path) -> None:
    """Draws curves.png: the change at a few n by step, of all evaluations in a folder."""
    results = []
    for step, found in evaluations.read_results(folder).items():
        results.append(Result("", evaluations.file_of(folder, step), found))
    draw(folder / "curves.png", figures.by_step, {str(folder.parent): results})


def draw(path: epath.Path, figure: Callable[[Any], bytes], found: Any) -> None:
    """Writes a figure of `found`; where matplotlib is not installed, says how to get it instead."""
    try:
        png = figure(found)
    except UserError as error:
        print(f"{path.name} is left out: {error}", flush=True)
        return
    files.write(path, png)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(
            config_of_training,
            "a config file, or the name of one in configs/; the training's config if left out",
        ),
        workdir=(
            REQUIRED,
            "workdir of a training job, or an exported folder, hf:OWNER/NAME, packaged",
        ),
        out=("", "where to write; the workdir if left out"),
        step=(None, "checkpoint step; the newest if left out"),
        steps=("", "checkpoint steps: all, or numbers separated by commas"),
        watch=(False, "evaluate each checkpoint of a running training as it appears"),
        patience=(PATIENCE, "seconds without a new checkpoint after which --watch ends"),
        **distributed.FLAGS,
    )
