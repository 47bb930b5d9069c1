"""seqio tasks and mixtures of text sources, and what training and evaluation read from them (see
sources.py).

Importing this module imports TensorFlow, so it is itself imported only where text is read.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from latent_delib.data.rows import BadRecords, Document, encode, pack, segments
from latent_delib.data.sources import Tfds, common_folder, local_files, only_files, parse
from latent_delib.data.tokenizer import Tokenizer, fingerprint
from latent_delib.errors import UserError, store_error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what TensorFlow prints to stderr from C++ at its import, which no log level turns
    off.
    """
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _quiet():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # the accelerator's memory is JAX's

SPLIT = "train"  # the one split of every task: the source string says what is read
SHUFFLE_DOCUMENTS = SHUFFLE_ROWS = 1000
_END = 1 << 16  # bytes
_LOST = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError, tf.errors.DataLossError)
_LOST += (tf.errors.UnimplementedError,)  # a kind of store that TensorFlow does not know


@contextlib.contextmanager
def reading(sources: Iterable[str]) -> Iterator[None]:
    """Raises UserError for a file that is lost, OSError where a store or disk fails; other faults
    are the program's.
    """
    try:
        yield
    except tf.errors.OpError as error:
        read = ", ".join(map(repr, sources))
        if not isinstance(error, _LOST):
            raise store_error(error, read) or error from None
        # The message names the file and the cause among parts of the pipeline.
        cause = error.message.partition("\n")[0].partition(" [Op:")[0]
        cause = re.sub(r"\{\{.*?\}\} |Error in user-defined function .* Iterator::\S+: ", "", cause)
        raise UserError(f"config.data: reading {read}: {cause}") from None


class _ShuffleDocuments:
    """Shuffles documents as well as files, differently in each epoch, before seqio repeats the
    source.
    """

    shuffle_files = True

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None):
        dataset = super().get_dataset(split, shuffle and self.shuffle_files, seed, shard_info)
        return dataset.shuffle(SHUFFLE_DOCUMENTS, seed=seed) if shuffle else dataset


class _Files(_ShuffleDocuments, seqio.FileDataSource):
    pass


class _Tfds(_ShuffleDocuments, seqio.TfdsDataSource):
    pass


def _numbered(texts: tf.data.Dataset, path: tf.Tensor) -> tf.data.Dataset:
    """Gives the texts of a file their numbers there, from 1, and drops the mark that may begin a
    UTF-8 file.
    """

    def record(number: tf.Tensor, text: tf.Tensor) -> dict[str, tf.Tensor]:
        unmarked = tf.strings.regex_replace(text, r"\A\x{FEFF}[\r\n]*", "")
        return {"text": tf.where(number == 1, unmarked, text), "file": path, "number": number}

    return texts.enumerate(1).map(record)


def _documents_of_file(path: tf.Tensor) -> tf.data.Dataset:
    text = tf.strings.join(["\n", tf.io.read_file(path), "\n"])
    text = tf.strings.regex_replace(text, r"(\r?\n\f)+\r?\n", "\n\f\n")
    text = tf.strings.regex_replace(tf.strings.split(text, "\n\f\n"), r"\A[\r\n]+|[\r\n]+\z", "")
    return _numbered(tf.data.Dataset.from_tensor_slices(text), path)


def _lines_of_file(path: tf.Tensor) -> tf.data.Dataset:
    return _numbered(tf.data.TextLineDataset(path), path)


def _data_source(source: str) -> tuple[seqio.DataSource, str]:
    """Returns the seqio source that a source string means, and the feature that holds its text."""
    meant = parse(source)
    if isinstance(meant, Tfds):
        return _tfds_source(source, *meant), meant.feature
    if "://" in meant.pattern:
        with reading([source]):
            found = tf.io.gfile.glob(meant.pattern)
    else:
        found = local_files(meant.pattern)
    files = only_files(source, found, tf.io.gfile.isdir)
    read = _documents_of_file if meant.kind == "files" else _lines_of_file
    return _Files(read, {SPLIT: files}), "text"


def _tfds_source(source: str, name: str, split: str, feature: str) -> seqio.DataSource:
    folder = os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
    try:  # from files only: the general tfds.builder asks the network for datasets it knows
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        raise UserError(
            f"config.data: source {source!r}: no dataset {name!r} in {folder} (TFDS_DATA_DIR)"
        ) from None
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    for kind, found, known in (
        ("split", split.partition("[")[0], builder.info.splits),
        ("text", feature, texts),
    ):
        if found not in known:
            raise UserError(
                f"config.data: source {source!r}: no {kind} {found!r}, {name} has {', '.join(known)}"
            )
    provider = _Tfds(tfds_data_dir=str(builder.data_dir), splits={SPLIT: split}, read_only=True)
    # such a dataset refuses to be read out of order
    provider.shuffle_files = not builder.info.disable_shuffling
    return provider


def _files_of(source: str) -> list[str]:
    return _data_source(source)[0].list_shards(SPLIT)


def _tokenize(
    dataset: tf.data.Dataset, source: str, feature: str, tokenizer: Tokenizer
) -> tf.data.Dataset:
    """Tokenizes texts into {"tokens": without BOS, "bytes": size of the text, "file", "bad": what
    is wrong, or empty}.

    Texts without a token are left out. Bad ones stay, without tokens, to be counted by the reader.
    """

    def numpy_tokenize(text: bytes, file: bytes, number: int) -> tuple[np.ndarray, int, bytes]:
        tokens, fault = encode(text, tokenizer)
        if not fault:
            return tokens, len(text), b""
        if file:
            unit = b"line" if source.startswith("lines:") else b"document"
            where = b"%s: %s %d" % (file, unit, number)
        else:  # a record of TFDS has no number: the beginning of its text names it
            where = b"%s: text %a" % (source.encode(), text[:60])
        return tokens, len(text), b"%s: %s" % (where, fault)

    def tokenize(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        file = example.get("file", tf.constant(""))
        texts = [example[feature], file, example.get("number", tf.constant(0))]
        types = [tf.int32, tf.int64, tf.string]
        tokens, size, bad = tf.numpy_function(numpy_tokenize, texts, types, stateful=False)
        tokens = tf.ensure_shape(tokens, [None])
        bad = tf.ensure_shape(bad, [])
        return {"tokens": tokens, "bytes": size, "file": file, "bad": bad}

    def is_something(example: dict[str, tf.Tensor]) -> tf.Tensor:
        return (tf.size(example["tokens"]) > 0) | (example["bad"] != "")

    return dataset.map(tokenize, tf.data.AUTOTUNE).filter(is_something)


def _pack(
    dataset: tf.data.Dataset, tokenizer: Tokenizer, sequence_length: Any = None
) -> tf.data.Dataset:
    """Packs documents into rows of sequence_length["tokens"] tokens (see rows.py); without a
    length, changes nothing.

    The "bad" of a row are the lines of the bad documents met since the rows before it.
    """
    if sequence_length is None:
        return dataset
    length = sequence_length["tokens"]

    def numpy_step(body: np.ndarray, lines: bytes, tokens: np.ndarray, bad: bytes) -> tuple:
        if bad:
            return body, lines + bad + b"\n", np.empty([0, length], np.int32), np.empty(0, object)
        rows, body = pack(
            body, tokens, length=length, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id
        )
        return body, b"" if len(rows) else lines, rows, np.full(len(rows), lines, object)

    def step(state: tuple, document: dict[str, tf.Tensor]) -> tuple:
        types = [tf.int32, tf.string, tf.int32, tf.string]
        arguments = [*state, document["tokens"], document["bad"]]
        body, lines, rows, bad = tf.numpy_function(numpy_step, arguments, types, stateful=False)
        state = (tf.ensure_shape(body, [None]), tf.ensure_shape(lines, []))
        return state, {
            "tokens": tf.ensure_shape(rows, [None, length]),
            "bad": tf.ensure_shape(bad, [None]),
        }

    nothing = {"tokens": tf.zeros([0], tf.int32), "bad": tf.constant("")}
    documents = dataset.map(lambda example: {key: example[key] for key in nothing})
    documents = documents.concatenate(tf.data.Dataset.from_tensors(nothing))
    return documents.scan((nothing["tokens"], nothing["bad"]), step).unbatch()


def _name(text: str, *identity: Any) -> str:
    """Returns a name that seqio accepts, the same for the same identity only."""
    digest = hashlib.sha256(repr((text, *identity)).encode()).hexdigest()
    return re.sub(r"\W+", "_", f"{text} {digest[:8]}")


def add_task(source: str, tokenizer_path: str, number: int = 0) -> str:
    """Registers the seqio task of a source, unless it is there already, and returns its name.

    Asked for with sequence_length={"tokens": T}, its dataset holds packed rows {"tokens": int32
    [T], "bad": string}. Otherwise it holds whole documents {"tokens": int32 [n] without BOS, "bad":
    string, "bytes": int64, "file": string}. "bad" says which documents are left out and why; it is
    empty as a rule.
    """
    provider, feature = _data_source(source)
    name = _name(f"{number:03} {source}", fingerprint(tokenizer_path), provider.list_shards(SPLIT))
    if name not in seqio.TaskRegistry.names():
        tokenizer = Tokenizer(tokenizer_path)
        tokenize = functools.partial(_tokenize, source=source, feature=feature, tokenizer=tokenizer)
        vocabulary = seqio.PassThroughVocabulary(tokenizer.vocab_size)  # the tokens are ids already
        seqio.TaskRegistry.add(
            name,
            source=provider,
            preprocessors=[tokenize, functools.partial(_pack, tokenizer=tokenizer)],
            output_features={"tokens": seqio.Feature(vocabulary, add_eos=False)},
            shuffle_buffer_size=SHUFFLE_ROWS,
        )
    return name


def add_mixture(sources: list[str], weights: list[float], tokenizer_path: str) -> str:
    """Registers the seqio mixture that draws rows of `sources` by `weights`; returns its name."""
    # seqio mixes in the order of the tasks' names: numbers keep it the same wherever the files lie
    tasks = [add_task(source, tokenizer_path, number) for number, source in enumerate(sources)]
    rates = list(zip(tasks, weights, strict=True))
    name = _name("mixture", rates)
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, rates)
    return name


def _elements(dataset: tf.data.Dataset, sources: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the elements of a dataset. Raises UserError for a file that vanished or is damaged."""
    with reading(sources):
        yield from dataset.as_numpy_iterator()


def _text(lines: bytes) -> str:
    return lines.decode(errors="backslashreplace")


def documents(source: str, tokenizer_path: str, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yields every good document of a source once, in a fixed order. Raises UserError where there
    is none.

    Each is {"tokens": int32 [n] without BOS, "bytes": int, "work": str, as in `rows.Document`}.
    """
    task = seqio.TaskRegistry.get(add_task(source, tokenizer_path))
    folder = common_folder(_files_of(source))
    of_files = not source.startswith("lines:")  # a record of TFDS has no file
    empty = True
    for document in _elements(task.get_dataset(None, SPLIT, shuffle=False), [source]):
        fault = document.pop("bad")
        file = _text(document.pop("file"))
        if fault:
            bad(_text(fault))
            continue
        empty = False
        yield document | {"work": file.removeprefix(f"{folder}/") if of_files else ""}
    if empty:
        raise UserError(f"config.data: source {source!r} holds no text")


def check_sources(sources: Iterable[str], tokenizer_path: str, bad: BadRecords) -> None:
    """Raises UserError unless each source can be read and holds text; reads up to the first good
    document of each.
    """
    for source in sources:
        next(documents(source, tokenizer_path, bad))


def validation_documents(data: Any, *, tokenizer_path: str) -> Iterator[Document]:
    """Returns `batches.validation_documents` of text."""
    bad = BadRecords(data.max_bad_records)
    check_sources(data.validation, tokenizer_path, bad)

    def found() -> Iterator[Document]:
        for source in data.validation:
            for document in documents(source, tokenizer_path, bad):
                yield Document(source, document["work"], document["tokens"])

    return found()


def num_bytes(source: str) -> int:
    """Returns the size of the files of a source, which a progress line counts towards."""
    return sum(tf.io.gfile.stat(path).length for path in _files_of(source))


def _fingerprint_of_file(path: str) -> tuple[int, str]:
    """Returns the size of a file, and a digest of its first and last 64 KiB."""
    with tf.io.gfile.GFile(path, "rb") as file:
        size = file.size()
        first = file.read(_END)
        file.seek(max(0, size - _END))
        return size, hashlib.sha256(first + file.read(_END)).hexdigest()


def source_fingerprint(source: str) -> str:
    """Returns a digest of a source's files, wherever they lie."""
    paths = sorted(_files_of(source))
    folder = common_folder(paths)
    kind = source[:5] if source.startswith(("files:", "lines:")) else source
    with reading([source]), ThreadPoolExecutor(32) as pool:
        found = list(pool.map(_fingerprint_of_file, paths))
    files = [
        (path.removeprefix(folder), *of_file) for path, of_file in zip(paths, found, strict=True)
    ]
    return hashlib.sha256(repr((kind, files)).encode()).hexdigest()


class Training(NamedTuple):
    """Serves `batches.Training` from text: every process runs the whole pipeline and keeps its
    rows.
    """

    data: Any
    tokenizer_path: str

    def fingerprint(self) -> dict[str, str]:
        """Returns a digest of each source."""
        return {
            f"sources[{i}]": source_fingerprint(source)
            for i, source in enumerate(self.data.sources)
        }

    def batches(
        self, *, batch_size: int, seed: int, rows: np.ndarray, start_step: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns batches without end, as `batches.Training` does."""
        data = self.data
        tokenizer = Tokenizer(self.tokenizer_path)
        bad = BadRecords(data.max_bad_records)
        mixture = seqio.MixtureRegistry.get(
            add_mixture(list(data.sources), list(data.weights), self.tokenizer_path)
        )
        # an endless repetition of nothing would never return
        check_sources(data.sources, self.tokenizer_path, bad)
        dataset = mixture.get_dataset(
            {"tokens": data.seq_len},
            SPLIT,
            seed=seed,
            num_epochs=None,
            trim_output_features=False,
            passthrough_features=["bad"],
        )

        def batch(element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            for record in _text(b"".join(element["bad"])).split("\n")[:-1]:
                bad(record)
            tokens = element["tokens"][rows]
            return {
                "tokens": tokens,
                "segment": segments(tokens, tokenizer.bos_id, tokenizer.pad_id),
            }

        elements = _elements(dataset.batch(batch_size).prefetch(2), data.sources)
        return itertools.islice(map(batch, elements), start_step, None)
