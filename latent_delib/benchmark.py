"""Benchmarks (Table 2) with the lm-eval harness: of a decoder, of a decoder with latents, of zero-shot CoT.

  python -m latent_delib.benchmark --workdir=DIR --benchmarks=published --model=decoder,augmented --out=DIR
  python -m latent_delib.benchmark --decoder=DIR --benchmarks=gsm8k,arc_easy --model=decoder --out=DIR [--limit=N]

Benchmarks are the names in configs/benchmarks.py, or `published`, or `offline`, which needs no network but the tasks
that `make_tasks` writes. Models: decoder; augmented, with the latents of WORKDIR, whatever its method, written once at
the end of the prompt; zero_shot_cot, the decoder without worked examples, told to think step by step.

Writes benchmarks.json to --out (may be gs://), a row saved as soon as it is there; run again, it does what is missing.
Each document's result is in OUT/samples.
"""

import hashlib
import json
import math
import os
import runpy
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from etils import epath

from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.lm import load
from latent_delib.lm.model import AugmentedLM, check_attention, check_rhythm
from latent_delib.machine import arguments, checkpoint, commands, files
from latent_delib.machine.provenance import provenance
from latent_delib.weights import folder

Row = dict[str, Any]

MODELS = ("decoder", "augmented", "zero_shot_cot")
KEY = ("benchmark", "model", "every", "delay")  # one row each
OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")  # Hugging Face's own switches
Z = 1.96  # standard errors, for 95 %


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
    """Runs every benchmark on every model of which OUT/benchmarks.json has no row yet; returns what that holds then.

    Args: as the command's flags; see there.

    Raises:
      UserError: anything wrong with the arguments, a checkpoint, a task's data; before weights are loaded.
    """
    if not os.path.isfile(table):
        raise UserError(f"--table={table}: no such file")
    rows = runpy.run_path(table)
    chosen, names = _chosen(rows, benchmarks), _split(model)
    if (wrong := [name for name in names if name not in MODELS]) or not names:
        raise UserError(f"--model={model}: expected some of {', '.join(MODELS)}, got {wrong}")
    check_rhythm(every, delay)
    check_attention(attention)
    arguments.whole("--batch_size", batch_size, 1)
    if limit is not None:
        arguments.whole("--limit", limit, 1)
    for name, row in chosen.items():
        if row.get("runs_code") and not confirm_run_unsafe_code:
            raise UserError(f"{name}: runs code that the model writes; --confirm_run_unsafe_code allows it")
    about, path = _identity(workdir, decoder, step)
    if "augmented" in names and about["config"]["method"]["num_latents"] == 0:
        raise UserError("--model=augmented: there is no coprocessor; give the --workdir of a job that trained one")
    found = _read(epath.Path(out) / "benchmarks.json", about)

    loaded = _load(chosen, rows["OFFLINE"], tasks)
    data = {name: _digest(row["task"], tasks) for name, row in chosen.items() if name in rows["OFFLINE"]}
    from latent_delib.measure import harness

    todo = []
    for name, row in chosen.items():
        asked = harness.kinds(loaded[name])
        if (answer := harness.longest_answer(loaded[name])) + 2 > max_length:  # BOS, and one token that asks
            raise UserError(f"--max_length={max_length}: {name} has answers of up to {answer} tokens")
        for one in names:
            key = {"benchmark": name, "model": one, "every": 0, "delay": 0}
            if one == "augmented":  # a choice's latents join once, a text that is read has nothing to wait for
                key["every"] = every if asked & {"generate_until", "loglikelihood_rolling"} else 0
                key["delay"] = delay if "generate_until" in asked else 0
            if one == "zero_shot_cot" and asked != {"generate_until"}:
                raise UserError(f"--model=zero_shot_cot: {name} has choices or text to score; nothing is generated")
            shots = 0 if one == "zero_shot_cot" else row["shots"]
            made = key | {"shots": shots, "max_length": max_length, "limit": limit}
            made |= {"task": row["task"], "metric": row["metric"], "filter": row.get("filter", "none")}
            made |= {"cot": rows["COT"] if one == "zero_shot_cot" else "", "data": data.get(name)}
            if not any(_serves(old, made) for old in found):
                _check_no_fewer(found, made, out)
                todo.append((made, row))
    if todo:
        dtype = about["config"].get("compute", {}).get("dtype", "float32")
        latents = any(made["model"] == "augmented" for made, _ in todo)
        coprocessor = load.load_coprocessor(workdir, about["step"]) if latents else None
        frozen = load.load_decoder(path, dtype)
        lm = AugmentedLM(frozen, coprocessor, max_length=max_length, attention=attention)
    for made, row in todo:
        adapter = harness.Adapter(
            lm,
            made["model"] == "augmented",
            made["every"],
            made["delay"],
            batch_size,
            made["cot"],
        )
        name = made["benchmark"]
        print(f"{name}, {made['model']}", flush=True)
        samples = harness.run(adapter, loaded[name], made["shots"], limit, confirm_run_unsafe_code)
        made |= figures([s for s in samples if s["filter"] == made["filter"]], row["metric"], name)
        there = _read(epath.Path(out) / "benchmarks.json", about)  # another call may have written since
        found = [old for old in there if any(old[k] != made[k] for k in KEY)] + [made | {"provenance": _provenance()}]
        write(epath.Path(out), {"rows": found, **about, "provenance": _provenance()}, made, samples)
    print(show(found), flush=True)
    return {"rows": found, **about}


def figures(samples: Sequence[Row], metric: str, name: str = "") -> Row:
    """A row's figures over documents: value with standard error and 95 % interval, unit, number of documents.

    Scores from 0 to 1 become percent, with Wilson's interval. bits_per_byte is Σ -log2 p / Σ bytes, with the standard
    error of a ratio.

    Raises:
      UserError: the documents carry no such metric.
    """
    values = [sample[metric] for sample in samples if metric in sample]
    n = len(values)
    if not n:
        has = sorted({m for sample in samples for m in sample["metrics"]})
        raise UserError(f"{name}: no document has metric {metric!r} under its filter; there are {has}")
    if metric == "bits_per_byte":
        bits, size = [-ll / math.log(2) for ll, _ in values], sum(size for _, size in values)
        value = sum(bits) / size
        residual = sum((b - value * s) ** 2 for b, (_, s) in zip(bits, values))
        stderr = math.sqrt(residual * n / (n - 1)) / size if n > 1 else None
        low, high = (None, None) if stderr is None else (value - Z * stderr, value + Z * stderr)
        unit = metric
    else:
        p = sum(map(float, values)) / n
        variance = sum((float(v) - p) ** 2 for v in values) / n  # p (1 - p) where every score is 0 or 1
        stderr = 100 * math.sqrt(variance / (n - 1)) if n > 1 else None
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(variance / n + Z**2 / (4 * n**2))
        low, high = (max(0.0, min(100.0, 100 * (middle + side) / (1 + Z**2 / n))) for side in (-half, half))
        value, unit = 100 * p, "percent"
    return {
        "metric": metric,
        "unit": unit,
        "value": value,
        "stderr": stderr,
        "low": low,
        "high": high,
        "documents": n,
    }


def show(rows: Sequence[Row]) -> str:
    """The rows as a table in plain text."""
    columns = ("benchmark", "model", "shots", "every", "delay", "documents", "value", "95 % interval", "unit")
    lines = [columns]
    for row in rows:
        interval = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        shown = row | {"value": f"{row['value']:.2f}", "95 % interval": interval, "documents": f"{row['documents']:,}"}
        lines.append(tuple(str(shown[column]) for column in columns))
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = {0, 1, len(columns) - 1}  # text; the rest are numbers
    return "\n".join(
        "  ".join(f"{cell:{'<' if i in left else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def write(out: epath.Path, result: dict[str, Any], row: Row, samples: Sequence[Row]) -> None:
    """benchmarks.json and the samples of one row, each under its name only once whole; the samples come first."""
    name = f"{row['benchmark']}.{row['model']}" + "".join(f".{k}{row[k]}" for k in ("every", "delay") if row[k])
    lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
    for path, text in (
        (out / "samples" / f"{name}.jsonl", "".join(f"{line}\n" for line in lines)),
        (out / "benchmarks.json", json.dumps(result, indent=2) + "\n"),
    ):
        files.write(path, text.encode())


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _serves(old: Row, asked: Row) -> bool:
    """Whether a row is what is asked for, or that over all documents: a quick look does not replace hours of work."""
    return all(old.get(k) == v or (k == "limit" and old.get(k) is None) for k, v in asked.items())


def _check_no_fewer(found: Sequence[Row], asked: Row, out: str) -> None:
    """Raises UserError where the row would take the place of one over more documents, made otherwise."""
    for old in found:
        fewer = asked["limit"] and (old["limit"] is None or old["limit"] > asked["limit"])
        if fewer and all(old[k] == asked[k] for k in KEY):
            what = f"{old['benchmark']} of {old['model']} over {old['limit'] or 'all'} documents, made otherwise"
            raise UserError(f"--limit={asked['limit']}: {out} has {what}; name another --out")


def _digest(task: str, folder: str) -> str:
    """SHA-256 over the files of a task of `make_tasks`, hex."""
    files = sorted(epath.Path(folder).glob(f"{task}.*"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _chosen(rows: dict[str, Any], benchmarks: str) -> dict[str, Row]:
    """The rows that --benchmarks names, in its order."""
    sets = {"published": rows["PUBLISHED"], "offline": rows["OFFLINE"]}
    known = rows["PUBLISHED"] | rows["OFFLINE"]
    chosen: dict[str, Row] = {}
    for name in _split(benchmarks):
        if name not in sets and name not in known:
            raise UserError(f"--benchmarks={name}: there are {', '.join([*sets, *known])}")
        chosen |= sets.get(name) or {name: known[name]}
    if not chosen:
        raise UserError(f"--benchmarks is empty; there are {', '.join([*sets, *known])}")
    return chosen


def _identity(workdir: str, decoder: str, step: int | None) -> tuple[dict[str, Any], str]:
    """What the figures are of (config, checkpoint, step, fingerprint of the decoder), and the decoder's folder."""
    if bool(workdir) == bool(decoder):
        raise UserError("give --workdir of a training job, or --decoder, a decoder folder; one of them")
    if decoder and step is not None:
        raise UserError(f"--step={step}: a checkpoint of --workdir; a --decoder has none")
    if decoder:
        config = {"decoder": {"path": decoder}, "method": {"name": "decoder", "num_latents": 0}}
        about = {"config": config, "checkpoint": None, "step": None}
        return about | {"fingerprint": folder.fingerprint(folder.locate(decoder))}, decoder
    checkpoints, found, meta = checkpoint.open_for_reading(workdir, step)
    checkpoints.close()
    config, path = meta["config"], load.decoder_of(workdir, meta)
    if METHODS[meta["method.name"]].write is None:
        config = config | {"method": config["method"] | {"num_latents": 0}}
    where = str(epath.Path(workdir) / "checkpoints" / str(found))
    fingerprint = folder.fingerprint(folder.locate(path))
    return {"config": config, "checkpoint": where, "step": found, "fingerprint": fingerprint}, path


def _read(path: epath.Path, about: dict[str, Any]) -> list[Row]:
    """The rows of an earlier call.

    Raises:
      UserError: they are of another decoder or checkpoint, or it is no such file.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows, theirs = found["rows"], {key: found[key] for key in ("fingerprint", "checkpoint")}
        same = found["config"] == json.loads(json.dumps(about["config"]))
        [row[key] for row in rows for key in (*KEY, "limit")]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what `benchmark` writes ({type(error).__name__}: {error})") from None
    for key, there in theirs.items():
        if there != about[key]:
            raise UserError(f"{path}: its rows have {key} {there}, this call {about[key]}; name another --out")
    if not same:
        raise UserError(f"{path}: its rows are of a training with another config; name another --out")
    return rows


def _load(chosen: dict[str, Row], offline: dict[str, Row], tasks: str) -> dict[str, Any]:
    """The tasks and their data, before any weights.

    Raises:
      UserError: a bad row; data that are neither here nor within reach; lm-eval is not installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is ours to say
    remote = [name for name in chosen if name not in offline]
    reached = not remote or _hub_answers()
    if not reached:  # what was fetched before still serves, and is found without waiting for the network
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    if any(row.get("runs_code") for row in chosen.values()):
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        from latent_delib.measure import harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: LATENT_DELIB_EXTRAS=eval ./launch/setup.sh brings it"
        ) from None
    manager = harness.TaskManager() if remote else None
    loaded = {}
    for name, row in chosen.items():
        try:
            loaded[name] = harness.load(row["task"], tasks, manager if name in remote else None)
        except UserError:
            raise
        except Exception as error:  # datasets raises what it likes
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            hub = "" if reached else f" {_hub()} does not answer and they were not fetched before: go online once."
            raise UserError(f"{name}: its data cannot be loaded.{hub} ({why})") from None
    return loaded


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _hub_answers() -> bool:
    if any(os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off") for name in OFFLINE):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(_hub(), method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer
    except (OSError, ValueError):  # ValueError: HF_ENDPOINT is no address
        return False
    return True


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
        attention=("auto", "its form: auto, by platform, or reference, xla, pallas_gpu, pallas_tpu"),
        tasks=("runs/tasks", "the folder that make_tasks wrote"),
        table=("configs/benchmarks.py", "the benchmarks, a row each"),
        confirm_run_unsafe_code=(False, "let mbpp and humaneval run code that the model writes"),
    )
