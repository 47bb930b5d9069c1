"""Perplexity of the n-th token ahead, with latents after every token and without (Section 3.1, Table 1).

  python -m latent_delib.evaluate --config=configs/X.py --workdir=DIR [--out=DIR] [--distributed]
      [--step=N | --steps=all | --steps=N,N,... | --watch [--patience=SECONDS]]

Prints the table and writes to OUT, the workdir if left out: perplexity.json, perplexity.png, and documents.npz, the
sums of each document. With --steps or --watch each checkpoint has its own in OUT/evaluations/STEP, those that are there
are not made again, and OUT/evaluations/curves.png shows all. --watch evaluates the checkpoints of a running training as
they appear, until its last. Killed at any time, the same command goes on. Both folders may be gs://BUCKET/PATH.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from latent_delib.data import batches, tokenizer
from latent_delib.errors import Outage, UserError
from latent_delib.job import experiment
from latent_delib.job.experiment import Experiment
from latent_delib.machine import checkpoint, commands, distributed, files
from latent_delib.machine.checkpoint import Restored, warn, whole_steps
from latent_delib.machine.progress import Progress
from latent_delib.machine.provenance import provenance
from latent_delib.measure import perplexity
from latent_delib.measure.perplexity import Sums, Text
from latent_delib.nn.transformer import Params
from latent_delib.results import figures, tables
from latent_delib.results.entries import controls_in_words
from latent_delib.results.runs import Result

SAVE_EVERY = 30.0  # seconds between two savings of partial sums
POLL = 20.0  # seconds between two looks for new checkpoints
FEW_WORKS = 20  # of a source, so many are reported each


def main(flags: Any) -> None:
    if (flags.step is not None) + bool(flags.steps) + flags.watch > 1:
        raise UserError("--step, --steps, --watch: expected one of them")
    if flags.steps and not re.fullmatch(r"all|\d+(,\d+)*", flags.steps):
        raise UserError(f"--steps={flags.steps}: expected all, or numbers with commas between")
    if flags.patience < 0:
        raise UserError(f"--patience={flags.patience}: expected at least 0")
    config, workdir, out = flags.config, flags.workdir, flags.out or flags.workdir
    if os.path.isfile(out):
        raise UserError(f"--out={out}: is a file, expected a folder")
    with distributed.job(flags):
        if flags.steps or flags.watch:
            steps = None if flags.steps in ("", "all") else [int(step) for step in flags.steps.split(",")]
            evaluate_many(config, workdir, out, steps, flags.patience if flags.watch else None)
        else:
            evaluate(config, workdir, out, flags.step)


def evaluate(config: ConfigDict, workdir: str, out: str, step: int | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint of `workdir` on the config's validation sources; returns what perplexity.json holds.

    Method "decoder" on a decoder with weights needs no checkpoint, unless a step is asked for: it is the frozen
    decoder. Of several processes each reads all of the text and computes its share of it, and all return the same.

    Raises:
      UserError: no checkpoint, one of another decoder or method, bad config or data.
    """
    job = Job(config, workdir, [step])
    untrained = config.method.name == "decoder" and bool(config.decoder.path)
    if untrained and step is None and not (epath.Path(workdir) / "checkpoints").is_dir():
        return job.run(None, epath.Path(out))
    return job.run(load(job.exp, workdir, step), epath.Path(out))


def evaluate_many(
    config: ConfigDict,
    workdir: str,
    out: str,
    steps: Sequence[int] | None = None,
    patience: float | None = None,
) -> None:
    """Evaluates checkpoints of `workdir`, the smallest step first, each under OUT/evaluations/STEP.

    Args:
      steps: which; None: all. Those that have a perplexity.json there are skipped.
      patience: None: those that are there now. Otherwise new ones too, until the training's last step is done, or for
        so many seconds none has come.

    Raises:
      UserError: as `evaluate`; there is no checkpoint of one of `steps`; OUT has evaluations of another config; in the
        end, when all others are done, for checkpoints that could not be read.
    """
    job, evaluations, failed = Job(config, workdir, [steps, patience]), epath.Path(out) / "evaluations", []
    for step in _arriving(job, evaluations, steps, patience):
        try:
            found = load(job.exp, workdir, step)
        except (OtherRun, Outage):
            raise
        except (UserError, OSError) as error:
            if _from_first(jax.process_index() == 0 and step not in whole_steps(workdir)):
                warn(f"{workdir}: checkpoint {step} was removed before it was read; skipped")
            else:
                warn(f"checkpoint {step} is not evaluated: {error}")
                failed.append(step)
            continue
        _check_text(evaluations, job.text)
        job.run(found, evaluations / str(step))
        del found  # before the next is read
        if jax.process_index() == 0:
            draw_curves(evaluations)
    if failed := _from_first([step for step in failed if step in whole_steps(workdir)]):  # others were being removed
        raise UserError(f"--workdir={workdir}: checkpoints {failed} could not be read; the same command tries again")


class OtherRun(UserError):
    """A checkpoint is of another decoder or method than the config: none of its workdir will fit."""


def load(exp: Experiment, workdir: str, step: int | None) -> Restored:
    """Reads a checkpoint, the newest without `step`: its trainable tree in the config's dtype, its step and its meta.

    Raises:
      UserError: there is none, or it is damaged; OtherRun.
    """

    def check(meta: dict[str, Any]) -> None:
        exp.check_same(meta, workdir)
        if meta["data"]["fingerprint"]["tokenizer"] != tokenizer.fingerprint(exp.tokenizer.path):
            raise UserError(f"config.decoder.tokenizer: {workdir} was trained with another than {exp.tokenizer.path}")

    wanted = experiment.trainable_shapes(exp)
    checkpoints, _, meta = checkpoint.open_for_reading(workdir, step)
    with contextlib.closing(checkpoints):
        try:
            check(meta)
        except UserError as error:
            raise OtherRun(str(error)) from None
        found = checkpoints.restore_newest(wanted, step=step, check=check)
    return found._replace(trainable=jax.tree.map(lambda x: x.astype(exp.dtype), found.trainable))


class Job:
    """What all checkpoints of a job share, each read or compiled once, when it is first needed: steps, text, decoder.

    `arguments`: what else must be the same on all processes.
    """

    def __init__(self, config: ConfigDict, workdir: str, arguments: Sequence[Any]):
        batches.check(config.data, "validation")
        self.exp, self.workdir = experiment.read(config), workdir
        self.plain = json.loads(config.to_json_best_effort())
        same = json.dumps([self.plain, workdir, *arguments])
        distributed.check_same(config=same, decoder=self.exp.fingerprint)
        self.steps = perplexity.jit_steps(self.exp)

    @functools.cached_property
    def text(self) -> Text:
        text = perplexity.read_text(self.exp)
        distributed.check_same(validation=text.digest())
        return text

    @functools.cached_property
    def frozen(self) -> Params:
        """Reads the decoder everything is compared with, and the coprocessor below adapters where there is one."""
        frozen = {"decoder": experiment.load_decoder(self.exp, self.exp.dtype)}
        if self.exp.start and self.exp.config.method.lora_rank:
            frozen["coprocessor"] = experiment.load_start(self.exp, self.exp.dtype)
        return frozen

    def run(self, found: Restored | None, out: epath.Path) -> dict[str, Any]:
        """Evaluates a checkpoint, or without one the frozen decoder; returns what perplexity.json holds."""
        sums, text, e = self.add_up(found, out / "partial.npz"), self.text, self.exp.config.evaluate
        if not sums.tokens.any():
            raise UserError(
                f"config.evaluate: max_positions={e.max_positions} and longer_prompt={e.longer_prompt} leave no token "
                "to count; give more positions (0: all), or a shorter prompt"
            )
        step, config = (None, self.plain) if found is None else (found.step, self.plain | _trained_as(found.meta))
        sets = {name: _of_source(sums, text, i, e.seed) for i, name in enumerate(text.sources)}
        if len(sets) > 1:
            whole = perplexity.summary(sums, text.work, e.seed, text.works_known)
        else:
            whole = {key: value for key, value in sets[text.sources[0]].items() if key != "works"}
        result = {
            **whole,
            "pieces": len(text.pieces),
            "sets": sets,
            "past_donors": perplexity.past_donors(self.exp, text) if e.swap else 0,
            "draws": perplexity.DRAWS,
            "config": config,
            "checkpoint": None if step is None else str(epath.Path(self.workdir) / "checkpoints" / str(step)),
            "step": step,
            "fingerprint": self.exp.fingerprint,
            "text": text.digest(),
            "provenance": _from_first(provenance()),
        }
        if jax.process_index() == 0:
            write(result, text, sums, out)
            (out / "partial.npz").unlink(missing_ok=True)
            print(show(result), flush=True)
        return result

    def add_up(self, found: Restored | None, partial: epath.Path) -> Sums:
        """Adds up the sums of a checkpoint; what is done is saved now and then, and what was saved is not done again.

        A saved part that is of another config, checkpoint, decoder, text or mesh is told of, and not used.
        """
        exp, text = self.exp, self.text
        checkpointed = None if found is None else [found.step, found.meta]
        identity = [self.plain, checkpointed, exp.fingerprint, text.digest(), dict(exp.mesh.shape), perplexity.DRAWS]
        identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        sums, before = _saved(partial, identity) or (perplexity.zeros(exp, text), 0)

        trainable = {} if found is None else found.trainable
        lengths = np.cumsum(sorted(map(len, text.pieces)))  # of all pieces up to each, in the order they are added
        what = "evaluated" if found is None else f"checkpoint {found.step} evaluated"
        progress = Progress(what, int(lengths[-1]), "tokens", int(lengths[before - 1]) if before else 0)
        since = time.monotonic()
        for done in perplexity.add_up(exp, self.steps, self.frozen, trainable, text, sums, before):
            if jax.process_index() == 0:
                progress(int(lengths[done - 1]))
                if time.monotonic() - since >= SAVE_EVERY:
                    _write_npz(partial, identity=identity, done=done, **sums._asdict())
                    since = time.monotonic()
        return sums


def _of_source(sums: Sums, text: Text, number: int, seed: int) -> dict[str, Any]:
    """Returns the part of perplexity.json on a source; "works" has a part on each with a name, where they are few."""
    here = text.source == number

    def of(documents: np.ndarray) -> dict[str, Any]:
        return perplexity.summary(sums.of(documents), text.work[documents], seed, text.works_known)

    named = [work for work in np.unique(text.work[here]) if text.works[work]]
    works = {text.works[work]: of(text.work == work) for work in named} if len(named) <= FEW_WORKS else {}
    return of(here) | {"works": works}


def _trained_as(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a checkpoint's own config that evaluating takes no notice of, such as the ahead tokens."""
    return {key: meta["config"][key] for key in ("method", "optimizer", "seed", "train")}


def _saved(partial: epath.Path, identity: str) -> tuple[Sums, int] | None:
    """Returns on every process the sums that process 0 finds in a partial.npz, and how many pieces they hold."""
    content = partial.read_bytes() if jax.process_index() == 0 and partial.exists() else b""
    if not (content := _bytes_from_first(content)):
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            if str(file["identity"]) == identity:
                return Sums(*(file[name] for name in Sums._fields)), int(file["done"])
        problem = "of another config, checkpoint, decoder, text or mesh"
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problem = f"damaged ({' '.join(str(error).split())})"
    warn(f"{partial} is {problem}: the evaluation begins anew")
    return None


def _arriving(job: Job, evaluations: epath.Path, steps: Sequence[int] | None, patience: float | None) -> Iterator[int]:
    """Yields the steps to evaluate, as `evaluate_many` says. Process 0 looks and decides, and tells the others."""
    first, since, over = jax.process_index() == 0, time.monotonic(), False
    wanted = set(steps or ())  # without `steps`: all that were there at some look
    settled: set[int] = set()  # evaluated before, yielded, or gone
    evaluated: list[int] = []  # of all that are there, because one curve goes through them
    if first and evaluations.exists():
        numbers = (int(folder.name) for folder in evaluations.iterdir() if folder.name.isdigit())
        evaluated = [number for number in numbers if _is_done(job, evaluations, number)]
    if first and patience is not None and not epath.Path(job.workdir).is_dir():
        raise UserError(f"--watch: --workdir={job.workdir}: no such folder; start the training first, it makes it")
    if first and patience is None:
        there = whole_steps(job.workdir)
        if not (there or wanted or evaluated):
            raise UserError(f"--workdir={job.workdir}: holds no checkpoints; train it first")
        if absent := [s for s in sorted(wanted - there) if not _is_done(job, evaluations, s)]:
            raise UserError(f"--steps: no checkpoint of step {absent[0]}; there are {sorted(there)}")
    while True:
        step, newest, nothing, pause = None, None, False, POLL
        if first:
            there = whole_steps(job.workdir)
            wanted |= there if steps is None else set()
            settled |= {s for s in wanted - settled if _is_done(job, evaluations, s)}
            for gone in sorted(wanted - settled - there):
                warn(f"{job.workdir}: checkpoint {gone} was removed before its turn; skipped")
                settled.add(gone)
            step, newest = min(wanted - settled, default=None), max(there, default=None)
            nothing = not (settled or evaluated)
            if patience is not None:
                left = patience - (time.monotonic() - since)
                over, pause = left <= 0, min(POLL, left)
        step, newest, over, nothing, pause = _from_first((step, newest, over, nothing, pause))
        if step is not None:
            settled.add(step)
            yield step
            since = time.monotonic()
            continue
        last = patience is not None and newest is not None and _is_last(job.workdir, newest)
        if over and nothing:
            raise UserError(f"--watch: no checkpoint came to {job.workdir} in {patience:g} s, so nothing was evaluated")
        if patience is None or last or over:
            if first and patience is not None:
                print(f"step {newest} was the last" if last else f"no new checkpoint for {patience:g} s", flush=True)
            return
        time.sleep(pause)


def _is_done(job: Job, evaluations: epath.Path, step: int) -> bool:
    """Tells whether a step is evaluated. Raises UserError where that was of something else: a curve shows one thing."""
    file = evaluations / str(step) / "perplexity.json"
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    ours = _subject(job.plain, job.exp.fingerprint)
    for key, value in _subject(found["config"], found["fingerprint"]).items():
        if value != ours[key]:
            raise UserError(f"{file}: has {key}={value}, this config {ours[key]}; give another --out, or remove it")
    e = job.exp.config.evaluate
    if (e.max_positions or e.swap) and found.get("draws", 1) != perplexity.DRAWS:
        raise UserError(f"{file}: an older version drew its positions and donors in another way; give another --out")
    return True


def _check_text(evaluations: epath.Path, text: Text) -> None:
    """Raises UserError where a step was evaluated on another text: that is read only where a step is left to do."""
    digest, first = text.digest(), jax.process_index() == 0
    folders = evaluations.iterdir() if first and evaluations.exists() else ()
    for file in sorted(f / "perplexity.json" for f in folders if f.name.isdigit()):
        if file.exists() and json.loads(file.read_text()).get("text", digest) != digest:
            raise UserError(f"{file}: is of another text, under the same names; give another --out, or remove it")


def _subject(config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Returns the things that evaluations must agree on to be compared."""
    keys = {
        "method": "name num_latents placement lora_rank start coprocessor",
        "data": "validation",
        "evaluate": "num_ahead max_length max_pieces max_positions seed delay swap longer_prompt",
    }
    named = {f"config.{room}.{key}": config[room].get(key) for room in keys for key in keys[room].split()}
    return {"fingerprint": fingerprint} | named


def _is_last(workdir: str, newest: int) -> bool:
    """Tells whether the newest checkpoint is the last that its training makes, as far as any can be read."""
    try:
        checkpoints, _, meta = checkpoint.open_for_reading(workdir)
    except (UserError, OSError):
        return False
    checkpoints.close()
    return newest >= meta["config"]["train"]["steps"]


def _from_first(value: Any) -> Any:
    """Returns on every process the value that process 0 calls this with; something JSON can hold."""
    return json.loads(_bytes_from_first(json.dumps(value).encode()))


def _bytes_from_first(content: bytes) -> bytes:
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content[:size].ljust(size, b"\0"), np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).tobytes()


def show(result: dict[str, Any]) -> str:
    """Writes the tables as plain text: of each set if there are several, each followed by its works, then of all."""
    sets = result["sets"]
    lines = [_heading(result)]
    for source, found in sets.items():
        if len(sets) > 1:
            lines += [f"{source}, {_documents(found)}"]
        lines += [perplexity.show(found["rows"], found["interval_over"]), *_show_works(found["works"])]
    if len(sets) > 1:
        lines += ["all", perplexity.show(result["rows"], result["interval_over"])]
    return "\n".join(lines)


def _heading(result: dict[str, Any]) -> str:
    """Says which method was evaluated, how, and on how much text."""
    method = result["config"]["method"]
    words = [method["name"] if result["step"] is None else f"{method['name']}, step {result['step']}"]
    if method["name"] != "decoder":
        words += [f"{method['num_latents']} latents, placement {method['placement']}"]
    words += controls_in_words(result["config"]["evaluate"])
    if result["past_donors"]:
        words += [f"at {result['past_donors']:,} positions beyond that text's end the latents after its last token"]
    words += [f"{result['pieces']} pieces of {_documents(result)}"]
    return f"perplexity of the n-th token ahead; {', '.join(words)}"


def _documents(part: dict[str, Any]) -> str:
    """Says how many documents there are, and of how many works where each is not a work of its own."""
    counts = {"works": f" of {part['num_works']} works", "documents of one work": " of one work"}
    count = part["documents"]
    return f"{count} document{'' if count == 1 else 's'}{counts.get(part['interval_over'], '')}"


def _show_works(works: dict[str, dict[str, Any]]) -> list[str]:
    """Writes a line for each of several works: its change at a few n."""
    if len(works) < 2:
        return []
    deepest = max(len(part["rows"]) for part in works.values())
    shown = [n for n in figures.CURVES if n <= deepest]
    lines = [["by work, intervals over its documents", *(f"n = {n}" for n in shown)]]
    for name, part in works.items():
        by_n = {row["n"]: row for row in part["rows"]}
        cells = [str(tables.change(by_n[n])) if n in by_n else "" for n in shown]
        lines.append([f"{name}, {_documents(part | {'interval_over': None})}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(["", *map(str.ljust, line, widths)]).rstrip() for line in lines]


def write(result: dict[str, Any], text: Text, sums: Sums, out: epath.Path) -> None:
    """Writes documents.npz, perplexity.png and, the last, perplexity.json: where it is, all are."""
    about = {"source": text.source, "sources": np.array(text.sources)}
    if text.works_known:
        about |= {"work": text.work, "works": np.array(text.works)}
    _write_npz(out / "documents.npz", **about, **sums._asdict())
    files.write(out / "perplexity.png", figures.by_n(result["rows"]))
    files.write(out / "perplexity.json", f"{json.dumps(result, indent=2)}\n".encode())


def draw_curves(evaluations: epath.Path) -> None:
    """Draws curves.png: the change at a few n against the step, of all evaluations that are there (Figure 3)."""
    found = {int(f.name): f / "perplexity.json" for f in evaluations.iterdir() if f.name.isdigit()}
    results = [Result("", file, json.loads(file.read_text())) for _, file in sorted(found.items()) if file.exists()]
    files.write(evaluations / "curves.png", figures.by_step({str(evaluations.parent): results}))


def _write_npz(path: epath.Path, **arrays: Any) -> None:
    np.savez(content := io.BytesIO(), **arrays)
    files.write(path, content.getvalue())


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(commands.CONFIG, "a file under configs/"),
        workdir=(commands.REQUIRED, "of a training job"),
        out=("", "where to write; the workdir if left out"),
        step=(None, "checkpoint step; the newest if left out"),
        steps=("", "several: all, or their numbers with commas between"),
        watch=(False, "evaluate each checkpoint of a running training as it appears"),
        patience=(86400.0, "seconds without a new checkpoint after which --watch ends"),
        **distributed.FLAGS,
    )
