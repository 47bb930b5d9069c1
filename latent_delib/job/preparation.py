"""Turns the texts of a config into token files. Needs no JAX, so that it starts fast.

It reads each source of `config.data.sources` and `config.data.validation` once, with the reader
that training from text uses too.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latent_delib.data import text, token_files
from latent_delib.data.rows import BadRecords, Document
from latent_delib.data.sources import Files, check_files, has_questions, is_on_hub, parse
from latent_delib.data.text_files import TextFiles
from latent_delib.data.tokenizer import Tokenizer, fingerprint
from latent_delib.errors import UserError
from latent_delib.machine import files
from latent_delib.machine.progress import Progress
from latent_delib.weights import locate, tokenizer_files

SPLITS = ("train", "validation")
OTHER_FOLDER = "name another folder (--out for prepare, --workdir for train with --text)"
COUNTS = ("documents", "tokens", "rows", "cut", "skipped")  # printed for each source at the end


def prepare(config: Any, out: str) -> dict:
    """Writes the token files of `config.data`, unless they are there; returns their meta.json.

    Bad documents are skipped and counted, up to `data.max_bad_records` in all.
    `batches.Training.batches` says which documents are bad. If the token files of a dataset on the
    Hub are finished, the Hub is not asked whether the dataset has changed.

    Args:
      config: the config of a training job.
      out: a local directory or gs:// path, made whole or not at all.

    Raises:
      UserError: too many bad documents, sources that are missing or empty, or other files in `out`.
    """
    data = config.data
    out = out.rstrip("/")
    sources = [*data.sources, *data.validation]
    check_files(sources)
    for held_out in data.validation:
        for source in data.sources:
            shared = shared_text(source, held_out)
            if shared:
                found = f"{source} has {len(shared)} of its parts too, such as {min(shared)}"
                print(f"warning: {held_out} is trained on: {found}", file=sys.stderr, flush=True)
    tokenizer = Tokenizer(tokenizer_of(config))
    if "://" in out:  # the store's client tries for minutes, without a word
        print(f"looking for token files in {out}", flush=True)
    found = token_files.read_meta(out)
    wanted = [source for source in sources if not (found and is_on_hub(source))]
    readers = {source: text.open_source(source) for source in wanted}
    meta = _describe(data, tokenizer, readers)
    if found:
        difference = _difference(found, meta)
        if difference:
            raise UserError(f"{out} holds other token files: {difference}; {OTHER_FOLDER}")
        print(f"{out} is already prepared from this config")
        return found
    if os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out)):
        raise UserError(f"{out}: exists, but holds no finished token files; {OTHER_FOLDER}")
    bad = BadRecords(data.max_bad_records)
    text.check_texts(readers.values(), tokenizer, bad)

    # A store renames nothing, so only meta.json marks a folder on it as finished.
    whole = contextlib.nullcontext(out) if "://" in out else files.atomic_folder(Path(out))
    with whole as directory:
        for split in SPLITS:
            for number, entry in enumerate(meta[split]):
                reader = readers[entry["source"]]
                skipped_before = bad.met.total()
                progress = Progress(f"{reader.source}: prepared", reader.num_bytes(), "bytes")
                documents = text.documents(reader, tokenizer, bad)
                documents = progress.over(documents, lambda document: document.num_bytes)
                entry |= _write_source(str(directory), split, number, documents, meta)
                entry["skipped"] = bad.met.total() - skipped_before
        token_files.write_meta(str(directory), meta)
    for entry in [*meta["train"], *meta["validation"]]:
        counts = [f"{entry[key]:,} {key}" for key in COUNTS if key in entry]
        print(f"{entry['source']}: {', '.join(counts)}")
    return meta


def tokenizer_of(config: Any) -> Path:
    """Returns the file of a config's tokenizer."""
    name = config.decoder.tokenizer
    if name not in ("", "packaged"):
        return Path(name)
    decoder = name or config.decoder.path or "packaged"
    return tokenizer_files.tokenizer_path(locate.find_decoder(decoder))


def _describe(data: Any, tokenizer: Tokenizer, readers: dict[str, text.Reader]) -> dict:
    """Returns the meta.json of token files that are about to be written, without counts.

    A source without a reader has no "text", the fingerprint.
    """

    def described(sources: Any) -> list[dict]:
        entries = [{"source": each} for each in sources]
        for entry in entries:
            if entry["source"] in readers:
                entry["text"] = readers[entry["source"]].fingerprint()
        return entries

    train = described(data.sources)
    for entry in train:
        entry["whole"] = has_questions(entry["source"])  # an argument of `rows.packed`

    return {
        "format": token_files.FORMAT,
        "seq_len": data.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "int32",
        "tokenizer_sha256": fingerprint(tokenizer.path),
        "train": train,
        "validation": described(data.validation),
    }


def _difference(found: dict, meta: dict) -> str | None:
    """Returns the first difference between finished token files and those that would be written."""
    for key in meta:
        there, here = found.get(key), meta[key]
        if key in SPLITS:
            there = [entry["source"] for entry in there]
            here = [entry["source"] for entry in here]
        if there != here:
            return f"{key} is {there} there and {here} here"
    for split in SPLITS:
        for there, here in zip(found[split], meta[split]):
            known = "text" in there and "text" in here  # older token files do not say
            if known and there["text"] != here["text"]:
                return f"the text of {here['source']} has changed"
            if here.get("whole") and not there.get("whole"):
                return f"an older version split questions of {here['source']} between rows"
    return None


def _write_source(
    directory: str, split: str, number: int, documents: Iterator[Document], meta: dict
) -> dict:
    """Writes one source; returns its counts."""
    if split == "train":
        tokens = (document.tokens for document in documents)
        whole = meta[split][number]["whole"]
        return token_files.write_train(directory, number, tokens, meta, whole)
    named = ((document.work, document.tokens) for document in documents)
    return token_files.write_validation(directory, number, named, meta)


def shared_text(source: str, other: str) -> set[str]:
    """Returns what two sources both read: files, or a split of a dataset.

    Copies of a file are not noticed, nor are two slices of one split that overlap.

    Raises:
      UserError: a source has an unknown form, or no files.
    """
    one, two = parse(source), parse(other)
    if isinstance(one, Files) and isinstance(two, Files):
        return _paths(source, one) & _paths(other, two)
    if isinstance(one, Files) or isinstance(two, Files) or one.whole_split != two.whole_split:
        return set()
    are_slices = "[" in one.split and "[" in two.split and one.split != two.split
    return set() if are_slices else {one.whole_split}


def _paths(source: str, meant: Files) -> set[str]:
    """Returns the paths of a source's files, without symbolic links."""
    paths = TextFiles(source, meant).parts
    return {path if "://" in path else os.path.realpath(path) for path in paths}
