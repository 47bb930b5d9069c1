"""Benchmarks (Table 2) with the lm-eval harness: of a decoder, of a decoder with latents, of zero-shot CoT.

  python -m latent_delib.benchmark --workdir=DIR --benchmarks=published --model=decoder,augmented --out=DIR
  python -m latent_delib.benchmark --decoder=DIR --benchmarks=gsm8k,arc_easy --model=decoder --out=DIR [--limit=N]

Benchmarks are the names in configs/benchmarks.py, or `published`, or `offline`, which needs no network but the tasks
that `make_tasks` writes. Models: decoder; augmented, with the latents of WORKDIR, whatever its method, written once at
the end of the prompt; zero_shot_cot, the decoder without worked examples, told to think step by step.

Writes benchmarks.json to --out (may be gs://), a row saved as soon as it is there; run again, it does what is missing.
Each document's result is in OUT/samples.
"""

import dataclasses
import hashlib
import json
import os
import runpy
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

from etils import epath

from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job.record import Record
from latent_delib.lm import load
from latent_delib.lm.inputs import check_attention, check_rhythm
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine import arguments, commands, files
from latent_delib.machine.provenance import provenance
from latent_delib.measure.scores import Row, figures, show
from latent_delib.weights import folder

FILE = "benchmarks.json"  # in --out
MODELS = ("decoder", "augmented", "zero_shot_cot")


class Subject(NamedTuple):
    """A decoder or training job that is measured.

    record: of the checkpoint, or of a config with the decoder alone; its fingerprint is of `decoder`. decoder: its
    folder. workdir: of the job; "" without one.
    """

    record: Record
    decoder: str
    workdir: str = ""

    @property
    def checkpoint(self) -> str | None:
        """Returns the folder of the checkpoint."""
        return str(epath.Path(self.workdir) / "checkpoints" / str(self.record.step)) if self.workdir else None

    def about(self) -> dict[str, Any]:
        """Returns the fields of benchmarks.json that say what its rows are of."""
        r = self.record
        return {"config": r.config, "checkpoint": self.checkpoint, "step": r.step, "fingerprint": r.fingerprint}


def main(flags: Any) -> None:
    benchmark(**flags.flag_values_dict())


def benchmark(
    out: str,
    benchmarks: str,
    model: str = "decoder",
    workdir: str = "",
    decoder: str = "",
    step: int | None = None,
    tasks: str = "runs/tasks",
    table: str = "configs/benchmarks.py",
    limit: int | None = None,
    every: int = 0,
    delay: int = 0,
    batch_size: int = 16,
    max_length: int = 8192,
    attention: str = "auto",
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Runs every benchmark on every model of which OUT/benchmarks.json has no row yet.

    Args: the flags of the command.

    Returns:
      The contents of OUT/benchmarks.json.

    Raises:
      UserError: anything wrong with the arguments, a checkpoint, a task's data; before weights are loaded.
    """
    if not os.path.isfile(table):
        raise UserError(f"--table={table}: no such file")
    rows = runpy.run_path(table)
    chosen = _chosen(rows, benchmarks)
    models = _split(model)
    wrong = [name for name in models if name not in MODELS]
    if wrong or not models:
        raise UserError(f"--model={model}: expected some of {', '.join(MODELS)}, got {wrong}")
    check_rhythm(every, delay)
    check_attention(attention)
    arguments.whole("--batch_size", batch_size, 1)
    if limit is not None:
        arguments.whole("--limit", limit, 1)
    runs_code = [name for name, row in chosen.items() if row.get("runs_code")]
    if runs_code and not confirm_run_unsafe_code:
        raise UserError(f"{runs_code[0]}: runs code that the model writes; --confirm_run_unsafe_code allows it")

    subject = _find_subject(workdir, decoder, step)
    if "augmented" in models and not subject.record["method.num_latents"]:
        raise UserError("--model=augmented: there is no coprocessor; give the --workdir of a job that trained one")
    found = _read_rows(epath.Path(out) / FILE, subject)
    if runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    harness = _harness()
    loaded = _load_tasks(harness, chosen, rows["OFFLINE"], tasks)
    for name, task in loaded.items():
        answer = harness.longest_answer(task)
        if answer + 2 > max_length:  # BOS, and one token that asks
            raise UserError(f"--max_length={max_length}: {name} has answers of up to {answer} tokens")
    todo = []
    for name, row in chosen.items():
        data = _digest(row["task"], tasks) if name in rows["OFFLINE"] else None
        for one in models:
            asked = _asked(name, row, one, harness.kinds(loaded[name]), every, delay)
            asked |= {"cot": rows["COT"] if one == "zero_shot_cot" else "", "data": data}
            asked |= {"max_length": max_length, "limit": limit}
            if not _is_there(found, asked, out):
                todo.append(asked)
    if todo:
        latents = any(asked["model"] == "augmented" for asked in todo)
        lm = _load_model(subject, latents, max_length, attention)
    for asked in todo:
        task = loaded[asked["benchmark"]]
        made, samples = _measure(lm, harness, task, asked, batch_size, confirm_run_unsafe_code)
        found = _save(epath.Path(out), subject, made, samples)
    print(show(found), flush=True)
    return {"rows": found, **subject.about()}


def _measure(
    lm: AugmentedLM, harness: ModuleType, task: dict[str, Any], asked: Row, batch_size: int, unsafe_code: bool
) -> tuple[Row, list[Row]]:
    """Makes a row.

    Args:
      task: from `harness.load_tasks`.
      asked: the part of the row that is known before.
      unsafe_code: code that the model writes may run.

    Returns:
      The row, and the harness's result for each document.
    """
    name = asked["benchmark"]
    print(f"{name}, {asked['model']}", flush=True)
    latents = asked["model"] == "augmented"
    adapter = harness.Adapter(lm, latents, asked["every"], asked["delay"], batch_size, asked["cot"])
    samples = harness.run_tasks(adapter, task, asked["shots"], asked["limit"], unsafe_code)
    counted = [sample for sample in samples if sample["filter"] == asked["filter"]]
    return asked | figures(counted, asked["metric"], name) | {"provenance": _provenance()}, samples


def _key(row: Row) -> tuple[Any, ...]:
    """Returns the fields that tell rows apart: benchmarks.json holds one row for each."""
    return row["benchmark"], row["model"], row["every"], row["delay"]


def _save(out: epath.Path, subject: Subject, made: Row, samples: Sequence[Row]) -> list[Row]:
    """Writes a row and, before it, the result of each document; returns all rows, with those that other calls added."""
    name = f"{made['benchmark']}.{made['model']}"
    for key in ("every", "delay"):
        if made[key]:
            name += f".{key}{made[key]}"
    lines = [json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in samples]
    files.write(out / "samples" / f"{name}.jsonl", "".join(lines).encode())
    others = [row for row in _read_rows(out / FILE, subject) if _key(row) != _key(made)]
    result = {"rows": [*others, made], **subject.about(), "provenance": _provenance()}
    files.write(out / FILE, (json.dumps(result, indent=2) + "\n").encode())
    return result["rows"]


def _split(names: str) -> list[str]:
    """Returns the different names of a list with commas."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _chosen(rows: dict[str, Any], benchmarks: str) -> dict[str, Row]:
    """Returns the rows that --benchmarks names, in its order."""
    known = rows["PUBLISHED"] | rows["OFFLINE"]
    sets = {"published": rows["PUBLISHED"], "offline": rows["OFFLINE"]}
    sets |= {name: {name: row} for name, row in known.items()}
    names = _split(benchmarks)
    if not names:
        raise UserError(f"--benchmarks is empty; there are {', '.join(sets)}")
    chosen: dict[str, Row] = {}
    for name in names:
        if name not in sets:
            raise UserError(f"--benchmarks={name}: there are {', '.join(sets)}")
        chosen |= sets[name]
    return chosen


def _asked(name: str, row: Row, model: str, kinds: set[str], every: int, delay: int) -> Row:
    """Returns the part of a row that is known before it is made.

    Args:
      name, row: of the table of benchmarks.
      kinds: the questions of its tasks; see `harness.kinds`.
    """
    if model == "zero_shot_cot" and kinds != {"generate_until"}:
        raise UserError(f"--model=zero_shot_cot: {name} has choices or text to score; nothing is generated")
    again = model == "augmented" and kinds & {"generate_until", "loglikelihood_rolling"}
    late = model == "augmented" and "generate_until" in kinds  # a text that is read waits for nothing
    return {
        "benchmark": name,
        "model": model,
        "every": every if again else 0,
        "delay": delay if late else 0,
        "shots": 0 if model == "zero_shot_cot" else row["shots"],
        "task": row["task"],
        "metric": row["metric"],
        "filter": row.get("filter", "none"),
    }


def _is_there(found: Sequence[Row], asked: Row, out: str) -> bool:
    """Tells whether a row is there. One over the first few documents gives way to one over more.

    Raises:
      UserError: it is there, but made in another way: over fewer documents than it has, or with other settings.
    """
    for old in found:
        if _key(old) != _key(asked):
            continue
        if old["limit"] is not None and (asked["limit"] is None or asked["limit"] > old["limit"]):
            return False
        for key, here in asked.items():
            there = old.get(key)
            if there != here:
                row = f"{old['benchmark']} of {old['model']}"
                raise UserError(f"--out={out}: has {row} with another {key} ({there}, here {here}); name another --out")
        return True
    return False


def _digest(task: str, folder: str) -> str:
    """Returns the SHA-256 of the files of a task of `make_tasks`, hex."""
    total = hashlib.sha256()
    for file in sorted(epath.Path(folder).glob(f"{task}.*")):
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _find_subject(workdir: str, decoder: str, step: int | None) -> Subject:
    """Finds what the flags name; reads no weights."""
    if bool(workdir) == bool(decoder):
        raise UserError("give --workdir of a training job, or --decoder, a decoder folder; one of them")
    if decoder:
        if step is not None:
            raise UserError(f"--step={step}: a checkpoint of --workdir; a --decoder has none")
        config = {"decoder": {"path": decoder}, "method": {"name": "decoder", "num_latents": 0}}
        return Subject(Record(config, folder.fingerprint(folder.locate(decoder))), decoder)
    record = load.read_record(workdir, step)
    path = load.decoder_of(workdir, record)
    config = record.config
    if METHODS[record["method.name"]].write is None:
        config = config | {"method": config["method"] | {"num_latents": 0}}
    record = dataclasses.replace(record, config=config, fingerprint=folder.fingerprint(folder.locate(path)))
    return Subject(record, path, workdir)


def _load_model(subject: Subject, latents: bool, max_length: int, attention: str) -> AugmentedLM:
    """Loads the weights."""
    coprocessor = load.load_coprocessor(subject.workdir, subject.record.step) if latents else None
    decoder = load.load_decoder(subject.decoder, subject.record["compute.dtype"] or "float32")
    return AugmentedLM(decoder, coprocessor, max_length=max_length, attention=attention)


def _read_rows(path: epath.Path, subject: Subject) -> list[Row]:
    """Reads the rows of an earlier call.

    Raises:
      UserError: they are of another decoder or checkpoint, or `benchmark` did not write the file.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows = found["rows"]
        checkpoint = found["checkpoint"]
        theirs = Record.from_result(found)
        for row in rows:
            _key(row)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `benchmark` writes ({type(error).__name__}: {error})") from None
    subject.record.require(theirs, "compare", str(path))
    remedy = "give another --out, or remove it"
    if checkpoint != subject.checkpoint:
        raise UserError(f"{path}: its rows are of checkpoint {checkpoint}, here {subject.checkpoint}; {remedy}")
    if theirs.config != subject.record.config:
        raise UserError(f"{path}: its rows are of a training with another config; {remedy}")
    return rows


def _harness() -> ModuleType:
    """Returns `measure.harness`, imported at its first use."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is ours to say
    try:
        from latent_delib.measure import harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: LATENT_DELIB_EXTRAS=eval ./launch/setup.sh brings it"
        ) from None
    return harness


def _load_tasks(
    harness: ModuleType, chosen: dict[str, Row], offline: dict[str, Row], tasks: str
) -> dict[str, dict[str, Any]]:
    """Loads the tasks and their data.

    Raises:
      UserError: a bad row; data that cannot be fetched.
    """
    manager = None if set(chosen) <= set(offline) else harness.TaskManager()
    loaded = {}
    for name, row in chosen.items():
        try:
            loaded[name] = harness.load_tasks(row["task"], tasks, None if name in offline else manager)
        except UserError:
            raise
        except Exception as error:  # datasets raises many kinds
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            remedy = "go online once; without a network HF_HUB_OFFLINE=1 takes what was fetched before"
            raise UserError(f"{name}: its data cannot be loaded ({why}); {remedy}") from None
    return loaded


def _provenance() -> dict[str, Any]:
    found = provenance()
    return found | {"versions": found["versions"] | {"lm_eval": metadata.version("lm_eval")}}


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        benchmarks=(commands.REQUIRED, "names with commas between, or published, or offline"),
        out=(commands.REQUIRED, "where to write"),
        workdir=("", "of a training job"),
        decoder=("", "a decoder folder, or `packaged`, where there is no workdir"),
        model=("decoder", "decoder, augmented, zero_shot_cot; several with commas between"),
        step=(None, "checkpoint step; the newest if left out"),
        limit=(None, "documents of each task, for a quick look; all if left out"),
        every=(0, "latents join again after each so many tokens; 0: once"),
        delay=(0, "tokens decoded before the latents join (asynchronous coprocessor)"),
        batch_size=(16, "prompts at once"),
        max_length=(8192, "tokens of a document and its answer; what a decoder was trained on bounds what makes sense"),
        attention=("auto", "its form: auto, a proven kernel or xla; or reference, xla, pallas_gpu, pallas_tpu"),
        tasks=("runs/tasks", "the folder that make_tasks wrote"),
        table=("configs/benchmarks.py", "the benchmarks, a row each"),
        confirm_run_unsafe_code=(False, "let mbpp and humaneval run code that the model writes"),
    )
