"""Turns the texts of a config into token files. Needs no JAX, so that it starts fast.

It reads each source of `config.data.sources` and `config.data.validation` once, with the reader
that training from text uses too. After an interruption it goes on with the first source that is
not whole.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from latent_delib.data import text, token_files
from latent_delib.data.rows import BadRecords
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
      out: a local directory or gs:// path. Unfinished token files of the same config are finished.

    Raises:
      UserError: too many bad documents, sources that are missing, empty or changed while they were
        read, other files in `out`, or another job that writes there.
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
    check_vectors(tokenizer, _num_vectors(config.decoder) or tokenizer.vocab_size)
    if "://" in out:  # the store's client tries for minutes, without a word
        print(f"looking for token files in {out}", flush=True)
    found = token_files.read_meta(out)
    wanted = [source for source in sources if not (found and is_on_hub(source))]
    readers = {source: text.open_source(source) for source in wanted}
    meta = _describe(data, tokenizer, readers)
    if found:
        difference = _difference(found, meta) or _text_difference(found, meta)
        if difference:
            raise UserError(f"{out} holds other token files: {difference}; {OTHER_FOLDER}")
        print(f"{out} is already prepared from this config")
        return found
    bad = BadRecords(data.max_bad_records)
    text.check_texts(readers.values(), tokenizer, bad)
    # One job at a time; on a store nothing can be locked.
    with contextlib.nullcontext() if "://" in out else files.locked(out, out):
        _take_over(out, meta)
        token_files.write_meta(out, meta, token_files.UNFINISHED)
        for split in SPLITS:
            for number, entry in enumerate(meta[split]):
                if _is_whole(entry):
                    continue
                reader = readers[entry["source"]]
                _write_source(out, split, number, reader, tokenizer, bad, meta)
                token_files.write_meta(out, meta, token_files.UNFINISHED)
        token_files.write_meta(out, meta)
    for entry in [*meta["train"], *meta["validation"]]:
        counts = [f"{entry[key]:,} {key}" for key in COUNTS if key in entry]
        print(f"{entry['source']}: {', '.join(counts)}")
    return meta


def _take_over(out: str, meta: dict) -> None:
    """Puts the counts of sources that are whole in unfinished token files into `meta`.

    Raises:
      UserError: `out` holds other files, or sources that were prepared from another config.
    """
    found = token_files.read_meta(out, token_files.UNFINISHED)
    if found is None:
        if "://" not in out and set(os.listdir(out)) - {files.LOCK}:
            raise UserError(f"{out}: exists, but holds no token files; {OTHER_FOLDER}")
        return
    whole = [entry["source"] for split in SPLITS for entry in found[split] if _is_whole(entry)]
    difference = _difference(found, meta)
    if whole and difference:
        raise UserError(
            f"{out} holds unfinished token files of another config (whole sources: {len(whole)}): "
            f"{difference}; delete the folder, or {OTHER_FOLDER}"
        )
    for split in SPLITS:
        for there, entry in zip(found[split], meta[split]):
            if _is_whole(there) and there["text"] == entry["text"]:
                entry |= there
                print(f"{entry['source']}: was prepared before the interruption")


def _is_whole(entry: dict) -> bool:
    """Tells whether all tokens of a source are written."""
    return "sha256" in entry


def tokenizer_of(config: Any) -> Path:
    """Returns the file of a config's tokenizer."""
    name = config.decoder.tokenizer
    if name not in ("", "packaged"):
        return Path(name)
    decoder = name or config.decoder.path or "packaged"
    return tokenizer_files.tokenizer_path(locate.find_decoder(decoder))


def check_vectors(tokenizer: Tokenizer, count: int) -> None:
    """Raises UserError if a tokenizer has more tokens than the decoder has vectors, `count`."""
    if tokenizer.vocab_size > count:
        raise UserError(
            f"config.decoder.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} pieces, "
            f"but the decoder has vectors for only {count}"
        )


def _num_vectors(decoder: Any) -> int:
    """Returns how many tokens the decoder of a config has vectors for; 0 if it is not here."""
    folder = locate.PACKAGED if decoder.path == "packaged" else Path(decoder.path)
    sizes = decoder.architecture
    if decoder.path and locate.is_ours(folder):
        sizes = files.read_json(folder / "config.json")["architecture"]
    return sizes.get("vocab_size", 0)


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
    """Returns the first difference between token files and those that would be written.

    The text itself is not compared.
    """
    for key in meta:
        there, here = found.get(key), meta[key]
        if key in SPLITS:
            there = [entry["source"] for entry in there]
            here = [entry["source"] for entry in here]
        if there != here:
            return f"{key} is {there} there and {here} here"
    return None


def _text_difference(found: dict, meta: dict) -> str | None:
    """Returns the first source whose text is packed in another way, or has changed."""
    for split in SPLITS:
        for there, here in zip(found[split], meta[split]):
            known = "text" in there and "text" in here  # older token files do not say
            if known and there["text"] != here["text"]:
                return f"the text of {here['source']} has changed"
            if here.get("whole") and not there.get("whole"):
                return f"an older version split questions of {here['source']} between rows"
    return None


def _write_source(
    out: str,
    split: str,
    number: int,
    reader: text.Reader,
    tokenizer: Tokenizer,
    bad: BadRecords,
    meta: dict,
) -> None:
    """Writes one source; puts its counts into its entry of `meta`.

    Raises:
      UserError: a document is bad, or files of the source changed while they were read.
    """
    entry = meta[split][number]
    skipped_before = bad.met.total()
    progress = Progress(f"{reader.source}: prepared", reader.num_bytes(), "bytes")
    documents = text.documents(reader, tokenizer, bad)
    documents = progress.over(documents, lambda document: document.num_bytes)
    if split == "train":
        tokens = (document.tokens for document in documents)
        counts = token_files.write_train(out, number, tokens, meta, entry["whole"])
    else:
        named = ((document.work, document.tokens) for document in documents)
        counts = token_files.write_validation(out, number, named, meta)
    if reader.fingerprint() != entry["text"]:
        raise UserError(
            f"config.data: source {reader.source!r} changed while it was read; run this again"
        )
    entry |= counts | {"skipped": bad.met.total() - skipped_before}


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
