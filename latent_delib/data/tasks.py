"""seqio tasks and mixtures of text sources, and what training and evaluation read from them.

A source is a string:

    packaged/train, packaged/validation   the text in data/corpus
    files:GLOB                            files of documents, separated by lines that hold only a form feed
    lines:GLOB                            files with a document on each line
    tfds:NAME:SPLIT:FEATURE               a prepared TFDS dataset in $TFDS_DATA_DIR; never downloaded

Importing this module imports TensorFlow, so it is itself imported only where text is read.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator

import numpy as np

from latent_delib.data.rows import pack, segments
from latent_delib.errors import UserError
from latent_delib.tokenizer import Tokenizer, fingerprint


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what TensorFlow and its tokenizer print to stderr from C++, which no log level turns off."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
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
_CORPUS = pathlib.Path(__file__).parent / "corpus"


class Vocabulary(seqio.Vocabulary):
    """A Tokenizer as seqio's vocabulary. As everywhere in seqio, decoding ends with the first EOS."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(tokenizer.path)

    bos_id = property(lambda self: self.tokenizer.bos_id)
    eos_id = property(lambda self: self.tokenizer.eos_id)
    pad_id = property(lambda self: self.tokenizer.pad_id)
    unk_id = property(lambda self: self.tokenizer.unk_id)
    _base_vocab_size = property(lambda self: self.tokenizer.vocab_size)

    def _encode(self, s):
        return self.tokenizer.encode(s)

    def _decode(self, ids):
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s):
        def encode(texts):  # of one: a scalar would come as something else outside of a graph
            text = texts[0].decode(errors="replace")  # who reads text refuses what is not UTF-8
            return np.array(self.tokenizer.encode(text), np.int32)

        ids = tf.numpy_function(encode, [tf.reshape(s, [1])], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids):
        def decode(rows):
            texts = [self.tokenizer.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.array(texts, object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), ids.shape[:-1])

    def __eq__(self, other):
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self):
        return hash(self.fingerprint)


class _ShuffleDocuments:
    """Shuffles documents as well as files, anew in each epoch, before seqio repeats the source."""

    shuffle_files = True

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None):
        dataset = super().get_dataset(split, shuffle and self.shuffle_files, seed, shard_info)
        return dataset.shuffle(SHUFFLE_DOCUMENTS, seed=seed) if shuffle else dataset


class _Files(_ShuffleDocuments, seqio.FileDataSource):
    pass


class _Tfds(_ShuffleDocuments, seqio.TfdsDataSource):
    pass


def _documents_of_file(path: tf.Tensor) -> tf.data.Dataset:
    text = tf.strings.join(["\n", tf.io.read_file(path), "\n"])
    text = tf.strings.regex_replace(text, r"(\r?\n\f)+\r?\n", "\n\f\n")
    return tf.data.Dataset.from_tensor_slices(tf.strings.split(text, "\n\f\n")).map(
        lambda document: {
            "text": tf.strings.regex_replace(document, r"\A[\r\n]+|[\r\n]+\z", ""),
            "origin": path,
        }
    )


def _lines_of_file(path: tf.Tensor) -> tf.data.Dataset:
    return tf.data.TextLineDataset(path).map(lambda line: {"text": line, "origin": path})


def _data_source(source: str) -> tuple[seqio.DataSource, str]:
    """The seqio source that a source string means, and the feature that holds its text."""
    kind, _, rest = source.partition(":")
    if source in ("packaged/train", "packaged/validation"):
        kind, rest = "files", f"{_CORPUS / source.removeprefix('packaged/')}/*.txt"
    if kind in ("files", "lines"):
        files = sorted(path for path in tf.io.gfile.glob(rest) if not tf.io.gfile.isdir(path))
        if not files:
            raise UserError(f"config.data: source {source!r}: no file matches {rest!r}")
        return _Files({"files": _documents_of_file, "lines": _lines_of_file}[kind], {SPLIT: files}), "text"
    if kind == "tfds" and (parts := re.fullmatch(r"(.+):([^:[\]]+(?:\[.*\])?):([^:]+)", rest)):
        name, split, feature = parts.groups()
        return _tfds_source(source, name, split, feature), feature
    forms = "packaged/train, packaged/validation, files:GLOB, lines:GLOB, tfds:NAME:SPLIT:FEATURE"
    raise UserError(f"config.data: unknown source {source!r}, expected one of the forms {forms}")


def _tfds_source(source: str, name: str, split: str, feature: str) -> seqio.DataSource:
    folder = os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
    try:  # from files only: the general tfds.builder asks the network for datasets it knows
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        raise UserError(f"config.data: source {source!r}: no dataset {name!r} in {folder} (TFDS_DATA_DIR)") from None
    texts = [key for key, value in builder.info.features.items() if isinstance(value, tfds.features.Text)]
    for kind, found, known in (("split", split.partition("[")[0], builder.info.splits), ("text", feature, texts)):
        if found not in known:
            raise UserError(f"config.data: source {source!r}: no {kind} {found!r}, {name} has {', '.join(known)}")
    provider = _Tfds(tfds_data_dir=str(builder.data_dir), splits={SPLIT: split}, read_only=True)
    provider.shuffle_files = not builder.info.disable_shuffling  # such a dataset refuses to be read out of order
    return provider


def _tokenize(dataset, output_features, source: str, feature: str):
    """Texts -> their tokens without BOS and their size in bytes; texts without a token are left out."""
    vocabulary = output_features["tokens"].vocabulary

    def require(condition, example, message):
        tf.debugging.Assert(condition, [tf.strings.join([example.get("origin", source), ": ", message])])

    def tokenize(example):
        text = example[feature]
        require(text == tf.strings.unicode_transcode(text, "UTF-8", "UTF-8"), example, "not UTF-8 text")
        tokens = vocabulary.encode_tf(text)
        special = tf.reduce_any((tokens == vocabulary.bos_id) | (tokens == vocabulary.pad_id))
        require(~special, example, "the tokenizer makes BOS or padding of its text")
        return {"tokens": tokens, "bytes": tf.strings.length(text)}

    return dataset.map(tokenize, tf.data.AUTOTUNE).filter(lambda example: tf.size(example["tokens"]) > 0)


def _pack(dataset, output_features, sequence_length=None):
    """Documents -> rows of sequence_length["tokens"] tokens (see rows.py); no length, no change."""
    if sequence_length is None:
        return dataset
    length, vocabulary = sequence_length["tokens"], output_features["tokens"].vocabulary
    numpy_step = functools.partial(pack, length=length, bos_id=vocabulary.bos_id, pad_id=vocabulary.pad_id)

    def step(body, tokens):
        rows, body = tf.numpy_function(numpy_step, [body, tokens], [tf.int32, tf.int32], stateful=False)
        return tf.ensure_shape(body, [None]), tf.ensure_shape(rows, [None, length])

    nothing = tf.zeros([0], tf.int32)
    documents = dataset.map(lambda example: example["tokens"]).concatenate(tf.data.Dataset.from_tensors(nothing))
    return documents.scan(nothing, step).unbatch().map(lambda row: {"tokens": row})


def _name(text: str, *identity) -> str:
    """A name that seqio accepts, the same for the same identity only."""
    digest = hashlib.sha256(repr((text, *identity)).encode()).hexdigest()
    return re.sub(r"\W+", "_", f"{text} {digest[:8]}")


def add_task(source: str, tokenizer_path: str) -> str:
    """Registers the seqio task of a source, unless it is there already, and returns its name.

    Its dataset holds packed rows {"tokens": int32 [T]} when asked for with sequence_length={"tokens": T}, and
    whole documents {"tokens": int32 [n]} without BOS otherwise.
    """
    provider, feature = _data_source(source)
    name = _name(source, fingerprint(tokenizer_path), provider.list_shards(SPLIT))
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=provider,
            preprocessors=[functools.partial(_tokenize, source=source, feature=feature), _pack],
            output_features={"tokens": seqio.Feature(Vocabulary(Tokenizer(tokenizer_path)), add_eos=False)},
            shuffle_buffer_size=SHUFFLE_ROWS,
        )
    return name


def add_mixture(sources: list[str], weights: list[float], tokenizer_path: str) -> str:
    """Registers the seqio mixture that draws rows of `sources` by `weights`; returns its name."""
    rates = [(add_task(source, tokenizer_path), weight) for source, weight in zip(sources, weights, strict=True)]
    name = _name("mixture", rates)
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, rates)
    return name


def _elements(dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    """The elements of a dataset; what `_tokenize` requires fails deep in TensorFlow: a UserError here."""
    iterator = dataset.as_numpy_iterator()
    for number in itertools.count():
        try:  # the tokenizer is made, and prints, with the first element
            with contextlib.nullcontext() if number else _quiet():
                element = next(iterator)
        except StopIteration:
            return
        except tf.errors.InvalidArgumentError as error:
            if found := re.search(r"assertion failed: \[(.*)\]", error.message):
                raise UserError(f"config.data: {found[1]}") from None
            raise
        yield element


def documents(source: str, tokenizer_path: str, shard_info=None) -> Iterator[dict[str, np.ndarray]]:
    """Every document of a source once, in a fixed order: {"tokens": int32 [n] without BOS, "bytes": int}."""
    task = seqio.TaskRegistry.get(add_task(source, tokenizer_path))
    dataset = task.get_dataset(None, SPLIT, shuffle=False, shard_info=shard_info)
    empty = True
    for document in _elements(dataset):
        yield document
        empty = False
    if empty:
        share = f" in the share of host {shard_info.index}" if shard_info and shard_info.num_shards > 1 else ""
        raise UserError(f"config.data: source {source!r} holds no text{share}")


def check_sources(sources: Iterable[str], tokenizer_path: str, shard_info=None) -> None:
    """Raises UserError unless each source can be read and holds text; reads the first document of each."""
    for source in sources:
        next(documents(source, tokenizer_path, shard_info))


def num_bytes(source: str) -> int:
    """Size of the files of a source: what a progress line measures itself against."""
    return sum(tf.io.gfile.stat(path).length for path in _data_source(source)[0].list_shards(SPLIT))


def train_batches(data, *, batch_size, seed, tokenizer_path, host, num_hosts, start_step):
    """`batches.train_batches` for text: a host reads its share of each source's files, or documents."""
    shard = seqio.ShardInfo(host, num_hosts)
    tokenizer = Tokenizer(tokenizer_path)
    mixture = seqio.MixtureRegistry.get(add_mixture(list(data.sources), list(data.weights), tokenizer_path))
    check_sources(data.sources, tokenizer_path, shard)  # an endless repetition of nothing would never return
    for source in data.sources:
        if (files := len(_data_source(source)[0].list_shards(SPLIT))) < num_hosts:
            warnings.warn(f"source {source!r} has {files} files: each of {num_hosts} hosts reads all", stacklevel=2)
    rows = batch_size // num_hosts
    dataset = mixture.get_dataset(
        {"tokens": data.seq_len},
        SPLIT,
        seed=seed,
        shard_info=shard,
        num_epochs=None,
        trim_output_features=False,
    )
    elements = itertools.islice(_elements(dataset.batch(rows).prefetch(2)), start_step, None)

    bos_id, pad_id = tokenizer.bos_id, tokenizer.pad_id
    return ({**batch, "segment": segments(batch["tokens"], bos_id, pad_id)} for batch in elements)


def validation_documents(data, *, tokenizer_path):
    """`batches.validation_documents` for text."""
    check_sources(data.validation, tokenizer_path)
    return ((source, d["tokens"]) for source in data.validation for d in documents(source, tokenizer_path))
