"""Runs benchmarks (Table 2) with the lm-eval harness: plain decoder, latents, zero-shot CoT.

  python -m latent_delib.benchmark --workdir=DIR --benchmarks=published
      --model=decoder,augmented --out=DIR
  python -m latent_delib.benchmark --decoder=DIR --benchmarks=gsm8k,arc_easy --out=DIR [--limit=N]

Benchmarks are names in configs/benchmarks.py; `published`; `offline`, the tasks that `make_tasks`
has written, which need no network; or qa:FILE, your own questions in JSON lines, where an answer
counts only if all of it is right. Rows of qa:FILE also have the log p of the right answer, except
those with --every or --delay. Models are decoder; augmented, with the latents of WORKDIR by any
method, written at the end of the prompt; and zero_shot_cot, the decoder without worked examples,
told to think step by step.

Writes benchmarks.json to --out (may be gs://), and saves each row as soon as it is made, compared
with the decoder's row if that is made. Run again, it makes the rows that are missing. The result of
each document is in OUT/samples.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

from etils import epath

from latent_delib import mesh as mesh_lib
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError, extra, store_errors
from latent_delib.job import build
from latent_delib.job.record import Record
from latent_delib.lm import load
from latent_delib.lm.inputs import ATTENTION_FLAG, check_attention, check_joining
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine import arguments, commands, files
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.provenance import provenance
from latent_delib.measure import scores, suites
from latent_delib.measure.scores import BenchmarkRow
from latent_delib.measure.suites import QUESTIONS_PREFIX
from latent_delib.weights import exported, folder, locate

FILE = "benchmarks.json"  # in --out
MODELS = ("decoder", "augmented", "zero_shot_cot")
SAME = ("task", "metric", "filter", "data", "limit", "documents")  # in rows that are compared


class Subject(NamedTuple):
    """Holds the decoder or training job that is measured.

    record: the record of the checkpoint; without a job, of a config that names the decoder alone.
      It has the fingerprint and the architecture of `decoder`.
    decoder: the decoder's folder.
    workdir: the job's workdir; "" without a job.
    """

    record: Record
    decoder: str
    workdir: str

    def about(self) -> dict[str, Any]:
        """Returns the fields of benchmarks.json that identify the subject of its rows."""
        checkpoint = exported.name_of(self.workdir, self.record.step) if self.workdir else None
        return self.record.as_result(checkpoint)


def main(flags: Any) -> None:
    """Makes the rows that OUT/benchmarks.json does not have yet, and prints all rows."""
    table = suites.read_table(flags.table)
    chosen = suites.choose(table, flags.benchmarks)
    _check_flags(flags, chosen)
    files.check_writable(flags.out)
    subject = _find_subject(flags)
    flags.max_length = min(flags.max_length, build.longest_text(subject.record))
    rows = _read_rows(epath.Path(flags.out) / FILE, subject)
    harness, harness_tasks = _import_harness(flags.confirm_run_unsafe_code)
    loaded = _load_tasks(harness_tasks, chosen, flags)
    wanted = []
    for name, row in chosen.items():
        for model in suites.listed(flags.model):
            kinds = harness_tasks.kinds(loaded[name])
            wanted.append(_wanted_row(name, row, model, kinds, table["COT"], flags))
    _check_joins(wanted, flags)
    missing = [asked for asked in wanted if not _is_there(rows, asked, flags.out)]
    if missing:
        lm = _load_model(subject, missing, flags)
        for asked in missing:
            made, samples = _measure(lm, harness, loaded[asked["benchmark"]], asked, flags)
            rows = _save(epath.Path(flags.out), subject, made, samples)
    print(scores.format_rows(list(rows.values())), flush=True)


# Before weights are loaded: the flags, the decoder or job, the tasks.


def _check_flags(flags: Any, chosen: dict[str, BenchmarkRow]) -> None:
    """Checks the flags that name no file."""
    models = suites.listed(flags.model)
    if not models or not set(models) <= set(MODELS):
        raise UserError(f"--model={flags.model}: expected some of {', '.join(MODELS)}")
    check_joining(flags.every, flags.delay)
    check_attention(flags.attention)
    arguments.whole("--batch_size", flags.batch_size, 1)
    arguments.whole("--max_length", flags.max_length, 2)
    if flags.limit is not None:
        arguments.whole("--limit", flags.limit, 1)
    for name, row in chosen.items():
        if row.get("runs_code") and not flags.confirm_run_unsafe_code:
            raise UserError(
                f"{name}: runs code that the model writes; --confirm_run_unsafe_code allows it"
            )


def _find_subject(flags: Any) -> Subject:
    """Finds the job or the decoder that the flags name; reads no weights."""
    workdir = flags.workdir
    if not workdir and not flags.decoder:
        raise UserError("expected --workdir, of a training job, or --decoder, a decoder folder")
    if workdir:
        record = load.read_record(workdir, flags.step)
        decoder = load.decoder_of(workdir, record, flags.decoder)
        config = record.config
        check_joining(flags.every, flags.delay, record["method.every"], record["method.name"])
        if not METHODS[record["method.name"]].writes_latents:
            config = config | {"method": config["method"] | {"num_latents": 0}}
    elif flags.step is not None:
        raise UserError(f"--step={flags.step}: needs --workdir; a --decoder has no checkpoints")
    else:
        decoder = flags.decoder
        config = {"decoder": {"path": decoder}, "method": {"name": "decoder", "num_latents": 0}}
        record = Record(config, "")
    where = locate.find_decoder(decoder)
    architecture = folder.read_config(where).to_dict()
    record = dataclasses.replace(
        record, config=config, fingerprint=folder.fingerprint(where), architecture=architecture
    )
    if "augmented" in suites.listed(flags.model) and not record["method.num_latents"]:
        raise UserError(
            "--model=augmented: no latents were trained; give a --workdir that trained some"
        )
    return Subject(record, decoder, workdir)


def _import_harness(unsafe_code: bool) -> tuple[ModuleType, ModuleType]:
    """Imports `measure.harness` and `measure.harness_tasks`.

    unsafe_code: whether code that a model writes may run.
    """
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")  # we print the progress
    with extra("eval"):
        from latent_delib.measure import harness, harness_tasks
    return harness, harness_tasks


def _load_tasks(
    harness_tasks: ModuleType, chosen: dict[str, BenchmarkRow], flags: Any
) -> dict[str, Any]:
    """Loads the tasks and their data, by the name of the benchmark.

    Raises:
      UserError: data that cannot be read or fetched; a task without what the table asks of it;
        answers longer than --max_length.
    """
    loaded = {}
    for name, row in chosen.items():
        if row["set"] == "offline":
            loaded[name] = harness_tasks.load_local_task(row["task"], flags.tasks)
            harness_tasks.check_row(loaded[name], row, f"--table={flags.table}")
        elif row["set"] == "questions":
            loaded[name] = harness_tasks.load_questions(row["task"].removeprefix(QUESTIONS_PREFIX))
        else:
            loaded[name] = harness_tasks.load_public_task(row["task"])
        answer = harness_tasks.longest_answer(loaded[name])
        if answer + 2 > flags.max_length:  # BOS, and one token that asks
            raise UserError(
                f"--max_length={flags.max_length}: {name} has answers of up to {answer} tokens"
            )
    return loaded


# Rows: the part known in advance, the rows of earlier calls, a new row.


def _wanted_row(
    name: str, row: BenchmarkRow, model: str, kinds: set[str], cot: str, flags: Any
) -> BenchmarkRow:
    """Returns the part of a row of benchmarks.json that is known before it is made.

    Args:
      name, row: the benchmark's name and its row of the table.
      model: one of MODELS.
      kinds: the kinds of its questions; see `harness_tasks.kinds`.
      cot: the words of zero-shot CoT.
    """
    is_cot = model == "zero_shot_cot"
    if is_cot and (kinds != {"generate_until"} or row["set"] == "questions"):
        raise UserError(
            f"--model=zero_shot_cot: {name} has choices, text to score or replies that are the "
            "answer alone; expected a task with free-form answers"
        )
    again = model == "augmented" and kinds & {"generate_until", "loglikelihood_rolling"}
    late = model == "augmented" and "generate_until" in kinds  # a scored text never waits
    return {
        "benchmark": name,
        "model": model,
        "every": flags.every if again else 0,
        "delay": flags.delay if late else 0,
        "shots": 0 if is_cot else row["shots"],
        "task": row["task"],
        "metric": row["metric"],
        "filter": row.get("filter", "none"),
        "cot": cot if is_cot else "",
        "data": suites.task_digest(row, flags.tasks),
        "max_length": flags.max_length,
        "limit": flags.limit,
    }


def _check_joins(wanted: Sequence[BenchmarkRow], flags: Any) -> None:
    """Raises UserError for --every or --delay where no row takes it."""
    for key in ("every", "delay"):
        value = getattr(flags, key)
        if value and not any(asked[key] for asked in wanted):
            raise UserError(f"--{key}={value}: no selected benchmark uses it; leave it out")


def _label(row: BenchmarkRow) -> str:
    """Names a row: for each name benchmarks.json holds one row, and OUT/samples one file."""
    label = f"{row['benchmark']}.{row['model']}"
    for key in ("every", "delay"):
        if row[key]:
            label += f".{key}{row[key]}"
    return label


def _read_rows(path: epath.Path, subject: Subject) -> dict[str, BenchmarkRow]:
    """Reads the rows of earlier calls, by their labels.

    Raises:
      UserError: they are of another decoder or checkpoint, or `benchmark` did not write the file.
        Fields that an older file lacks are not compared.
    """
    with store_errors(path):
        if not path.exists():
            return {}
        content = path.read_bytes()
    try:
        found = json.loads(content)
        rows = {_label(row): row for row in found["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not written by `benchmark` ({type(error).__name__}: {error})"
        ) from None
    for key, here in subject.about().items():
        there = found.get(key, here)
        if there != here:
            values = "" if isinstance(here, dict) else f" ({there}, here {here})"
            raise UserError(
                f"{path}: its rows are of another {key}{values}; give another --out, or remove it"
            )
    return rows


def _is_there(rows: dict[str, BenchmarkRow], asked: BenchmarkRow, out: str) -> bool:
    """Tells whether a row is done; a row of fewer documents than are asked for is not.

    Raises:
      UserError: the row exists, but has more documents than are asked for, or other settings.
    """
    old = rows.get(_label(asked))
    if old is None:
        return False
    has_limit = old["limit"] is not None
    is_shorter = has_limit and (asked["limit"] is None or asked["limit"] > old["limit"])
    for key, here in asked.items():
        if key == "limit" and is_shorter:
            continue
        if old.get(key) != here:
            has = f"has {_label(asked)} with another {key} ({old.get(key)}, here {here})"
            raise UserError(f"--out={out}: {has}; name another --out")
    return not is_shorter


def _load_model(subject: Subject, missing: Sequence[BenchmarkRow], flags: Any) -> AugmentedLM:
    """Loads the weights that the missing rows need."""
    mesh = mesh_lib.make({"data": -1, "tensor": flags.tensor})
    coprocessor = None
    if any(asked["model"] == "augmented" for asked in missing):
        coprocessor = load.load_coprocessor(subject.workdir, subject.record.step)
    dtype = subject.record["compute.dtype"] or "float32"
    decoder = load.load_decoder(subject.decoder, dtype, mesh)
    return AugmentedLM(
        decoder, coprocessor, mesh, max_length=flags.max_length, attention=flags.attention
    )


def _measure(
    lm: AugmentedLM, harness: ModuleType, task: Any, asked: BenchmarkRow, flags: Any
) -> tuple[BenchmarkRow, list[BenchmarkRow]]:
    """Makes a row; returns it, and the harness's result for each document."""
    print(f"{asked['benchmark']}, {asked['model']}", flush=True)
    latents = asked["model"] == "augmented"
    adapter = harness.Adapter(
        lm, latents, asked["every"], asked["delay"], flags.batch_size, asked["cot"]
    )
    logp: list[float] = []
    # Answers are scored with the latents of the prompt's end alone.
    if asked["task"].startswith(QUESTIONS_PREFIX) and not (asked["every"] or asked["delay"]):
        logp = adapter.answer_logprobs(task, asked["limit"])
    samples = harness.run_tasks(
        adapter, task, asked["shots"], asked["limit"], flags.confirm_run_unsafe_code
    )
    for sample in samples:
        if logp:
            sample[scores.ANSWER] = logp[sample["doc_id"]]
    counted = [sample for sample in samples if sample["filter"] == asked["filter"]]
    figures = scores.summarize_scores(counted, asked["metric"], asked["benchmark"])
    return asked | figures | {"provenance": _provenance()}, samples


def _save(
    out: epath.Path, subject: Subject, made: BenchmarkRow, samples: Sequence[BenchmarkRow]
) -> dict[str, BenchmarkRow]:
    """Writes each document's result and then the row; returns all rows, earlier ones too."""
    lines = [json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in samples]
    files.write(_samples_file(out, made), "".join(lines).encode())
    rows = _read_rows(out / FILE, subject)
    rows.pop(_label(made), None)
    rows[_label(made)] = made
    _compare(out, [row for row in rows.values() if row["benchmark"] == made["benchmark"]])
    result = {"rows": list(rows.values()), **subject.about(), "provenance": _provenance()}
    files.write(out / FILE, (json.dumps(result, indent=2) + "\n").encode())
    return rows


def _compare(out: epath.Path, rows: Sequence[BenchmarkRow]) -> None:
    """Compares the rows of a benchmark with the decoder's row, if it is of the same documents."""
    base = next((row for row in rows if row["model"] == "decoder"), None)
    for row in rows:
        for key in scores.CHANGE_FIELDS:
            row.pop(key, None)
        if base in (None, row) or any(row.get(key) != base.get(key) for key in SAME):
            continue
        ours, theirs = _read_samples(out, row), _read_samples(out, base)
        if len(ours) == len(theirs) == row["documents"]:  # else samples are gone, or newer
            row |= scores.compare_scores(ours, theirs, row["metric"])


def _samples_file(out: epath.Path, row: BenchmarkRow) -> epath.Path:
    return out / "samples" / f"{_label(row)}.jsonl"


def _read_samples(out: epath.Path, row: BenchmarkRow) -> list[BenchmarkRow]:
    """Reads the result of each document that a row counts; nothing if the file is gone."""
    path = _samples_file(out, row)
    with store_errors(path):
        content = path.read_bytes() if path.exists() else b""
    samples = map(json.loads, content.splitlines())
    return [each for each in samples if each["filter"] == row["filter"] and row["metric"] in each]


def _provenance() -> dict[str, Any]:
    found = provenance()
    return found | {"versions": found["versions"] | {"lm_eval": metadata.version("lm_eval")}}


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        benchmarks=(REQUIRED, "names separated by commas, or published, or offline, or qa:FILE"),
        out=(REQUIRED, "where to write"),
        workdir=("", "workdir of a training job, or an exported folder, hf:OWNER/NAME, packaged"),
        decoder=(
            "",
            "a decoder folder or `packaged`, instead of --workdir; with --workdir, where its "
            "decoder is now",
        ),
        model=("decoder", "decoder, augmented, zero_shot_cot; several separated by commas"),
        step=(None, "checkpoint step; the newest if left out"),
        limit=(None, "documents of each task, for a quick test; all if left out"),
        every=(0, "latents join again after this many tokens, each time; 0: once"),
        delay=(0, "tokens decoded before the latents join (asynchronous coprocessor)"),
        tensor=(1, "devices that split each layer between them; prompts are split over the rest"),
        batch_size=(16, "prompts at once"),
        max_length=(
            8192,
            "tokens of a document and its answer; useful up to what the decoder was trained on",
        ),
        attention=ATTENTION_FLAG,
        tasks=("runs/tasks", "the folder that tools.make_tasks wrote"),
        table=("configs/benchmarks.py", "the table of benchmarks, a file of this form"),
        confirm_run_unsafe_code=(False, "let mbpp and humaneval run code that the model writes"),
    )
