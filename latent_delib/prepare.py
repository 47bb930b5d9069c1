"""Turns the texts of a config into token files.

  python -m latent_delib.prepare --config=configs/X.py --out=DIR [--config.key=value ...]

One pass over each source of `config.data.sources` and `config.data.validation`, through the seqio tasks that
training from text uses too. Training and evaluation then read DIR, named in `config.data.token_files`, without
TensorFlow.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_delib.data import token_files
from latent_delib.data.rows import BadRecords, check_data
from latent_delib.data.sources import check_files
from latent_delib.data.tokenizer import Tokenizer, fingerprint
from latent_delib.errors import UserError
from latent_delib.job.experiment import check
from latent_delib.job.experiment import tokenizer_path as tokenizer_path_of
from latent_delib.machine import commands, files
from latent_delib.machine.progress import Progress


def _progress(source: str, documents: Iterator[dict], total: int) -> Iterator[dict]:
    """Yields the same documents, of `total` bytes of text in all; says how many are through."""
    done, say = 0, Progress(f"{source}: prepared", total, "bytes")
    for document in documents:
        yield document
        done += int(document["bytes"])
        say(min(done, total))


def _write_train(directory: str, number: int, documents: Iterator[dict], meta: dict) -> dict:
    return token_files.write_train(directory, number, (d["tokens"] for d in documents), meta)


def _write_validation(directory: str, number: int, documents: Iterator[dict], meta: dict) -> dict:
    return token_files.write_validation(directory, number, ((d["work"], d["tokens"]) for d in documents), meta)


SPLITS = {"train": _write_train, "validation": _write_validation}


def _difference(found: dict, meta: dict) -> str | None:
    """The first thing in which finished token files are not what would be written."""
    for key, value in meta.items():
        there = found.get(key)
        if key == "format" and there in range(1, token_files.FORMAT):
            continue  # what an older version wrote is read too
        if key in SPLITS:
            there, value = ([entry["source"] for entry in entries or ()] for entries in (there, value))
        if there != value:
            return f"{key} is {there} there and {value} here"
    for split in SPLITS:
        for theirs, ours in zip(found[split], meta[split]):
            if theirs.get("text", ours["text"]) != ours["text"]:  # older token files do not say
                return f"the text of {ours['source']} is another now"
    return None


def _table(meta: dict) -> str:
    rows = [("source", "documents", "tokens", "rows", "skipped")]
    for entry in (entry for split in SPLITS for entry in meta[split]):
        rows.append((entry["source"], *(f"{entry[key]:,}" if key in entry else "" for key in rows[0][1:])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def prepare(config: Any, out: str) -> dict:
    """Writes the token files of `config.data` to `out`, a local directory or gs:// path; returns its meta.json.

    Does nothing where `out` holds them already. Bad documents (`batches.train_batches` says which) are skipped and
    counted, up to `data.max_bad_records` in all. Raises UserError for one more, for
    sources that are missing or empty, and where `out` holds anything else.
    """
    data, out = config.data, out.rstrip("/")
    check_data(data)
    check_files([*data.sources, *data.validation])
    from latent_delib.data import tasks  # and with it TensorFlow, which takes its time

    tokenizer_path = str(tokenizer_path_of(config))
    tokenizer = Tokenizer(tokenizer_path)
    meta = {
        "format": token_files.FORMAT,
        "seq_len": data.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32",
        "tokenizer_sha256": fingerprint(tokenizer_path),
        "train": [{"source": source, "text": tasks.source_fingerprint(source)} for source in data.sources],
        "validation": [{"source": source, "text": tasks.source_fingerprint(source)} for source in data.validation],
    }
    if found := token_files.read_meta(out):
        if differing := _difference(found, meta):
            raise UserError(f"--out={out} holds other token files: {differing}; name another")
        print(f"{out} is already prepared from this config")
        if any("works" not in entry for entry in found["validation"]):
            print(
                f"{out} does not say which work a document is of: an older version wrote it, another --out would say it"
            )
        return found
    if os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out)):
        raise UserError(f"--out={out} exists and holds no finished token files: name another")
    bad = BadRecords(data.max_bad_records)
    tasks.check_sources([*data.sources, *data.validation], tokenizer_path, bad)

    remote = "://" in out  # renames nothing: there meta.json alone tells finished from unfinished
    with contextlib.nullcontext(out) if remote else files.whole(Path(out)) as where:
        directory = str(where)
        for split, write in SPLITS.items():
            for i, entry in enumerate(meta[split]):
                source, met = entry["source"], bad.met.total()
                documents = tasks.documents(source, tokenizer_path, bad)
                entry |= write(directory, i, _progress(source, documents, tasks.num_bytes(source)), meta)
                entry["skipped"] = bad.met.total() - met
        token_files.write_meta(directory, meta)
    print(_table(meta))
    return meta


def main(values: Any) -> None:
    check(values.config)  # of the same flags as the training that follows
    prepare(values.config, values.out)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(commands.CONFIG, "config file"),
        out=(commands.REQUIRED, "directory or gs:// path to write, made whole or not at all"),
    )
