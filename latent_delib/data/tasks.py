"""seqio tasks and mixtures of text sources, and the training batches that come through them.

Importing this module imports TensorFlow, so it is itself imported only where training reads text.
"""

import errno
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from latent_delib.data import text
from latent_delib.data.rows import BadRecords, grouped, pack, segments
from latent_delib.data.sources import Tfds, parse
from latent_delib.data.stores import builder, quiet, tf
from latent_delib.data.tokenizer import Tokenizer, fingerprint
from latent_delib.errors import Outage, UserError

with quiet():
    import seqio

SPLIT = "train"  # the one split of every task: the source string says what is read
SHUFFLE_DOCUMENTS = SHUFFLE_ROWS = 1000
_BLOCK = 256  # texts that TensorFlow takes from the reader at once


class _ShuffleDocuments:
    """Shuffles documents as well as files, anew in each epoch, before seqio repeats the source."""

    shuffle_files = True

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None):
        dataset = super().get_dataset(split, shuffle and self.shuffle_files, seed, shard_info)
        return dataset.shuffle(SHUFFLE_DOCUMENTS, seed=seed) if shuffle else dataset


class _Files(_ShuffleDocuments, seqio.FileDataSource):
    def list_shards(self, split):
        return self._split_to_filepattern[split]  # names, though they may look like patterns


class _Tfds(_ShuffleDocuments, seqio.TfdsDataSource):
    def get_dataset(self, *arguments, **named):
        records = super().get_dataset(*arguments, **named)
        return records.map(lambda record: text.Text(record[self.feature])._asdict())


def _blocks(source: str, path: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the contents and the numbers of the texts of a file, many at once."""
    texts = text.texts_of_file(source, path.decode())
    for block in grouped(texts, _BLOCK):
        contents = np.array([found.content for found in block], object)
        yield contents, np.array([found.number for found in block])


def _texts_of_file(path: tf.Tensor, source: str) -> tf.data.Dataset:
    """Makes a dataset of the texts of a file, as `text.Text`."""
    blocks = functools.partial(_blocks, source)
    signature = (tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64))
    texts = tf.data.Dataset.from_generator(blocks, args=[path], output_signature=signature)
    texts = texts.unbatch()
    return texts.map(lambda content, number: text.Text(content, path, number)._asdict())


def _data_source(source: str) -> seqio.DataSource:
    """Returns the seqio source that a source string means."""
    meant = parse(source)
    if not isinstance(meant, Tfds):
        read = functools.partial(_texts_of_file, source=source)
        files = {SPLIT: text.files_of(source)}
        return _Files(read, files, cycle_length=text.CYCLE, block_length=text.BLOCK)
    stored = builder(meant)
    folder = str(stored.data_dir)
    provider = _Tfds(tfds_data_dir=folder, splits={SPLIT: meant.split}, read_only=True)
    provider.feature = meant.feature
    # Such a dataset refuses to be read out of order.
    provider.shuffle_files = not stored.info.disable_shuffling
    return provider


def _tokenize(dataset: tf.data.Dataset, source: str, tokenizer: Tokenizer) -> tf.data.Dataset:
    """Tokenizes texts into {"tokens": int32 [n] without BOS, "bad": what is wrong, or empty}.

    Texts without a token are left out. Bad ones stay, without tokens, to be counted by the reader.
    """

    def numpy_tokenize(content: bytes, file: bytes, number: int) -> tuple[np.ndarray, bytes]:
        found = text.Text(content, file.decode(), number)
        tokens, fault = text.tokens_of(source, found, tokenizer)
        return tokens, fault.encode(errors="backslashreplace")

    def tokenize(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        arguments = text.Text(**example)
        types = [tf.int32, tf.string]
        tokens, bad = tf.numpy_function(numpy_tokenize, arguments, types, stateful=False)
        return {"tokens": tf.ensure_shape(tokens, [None]), "bad": tf.ensure_shape(bad, [])}

    def is_something(example: dict[str, tf.Tensor]) -> tf.Tensor:
        return (tf.size(example["tokens"]) > 0) | (example["bad"] != "")

    return dataset.map(tokenize, tf.data.AUTOTUNE).filter(is_something)


def _pack(
    dataset: tf.data.Dataset, tokenizer: Tokenizer, sequence_length: Any = None
) -> tf.data.Dataset:
    """Packs documents into rows of sequence_length["tokens"] tokens; changes nothing without it.

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
    documents = dataset.concatenate(tf.data.Dataset.from_tensors(nothing))
    return documents.scan((nothing["tokens"], nothing["bad"]), step).unbatch()


def _name(text: str, *identity: Any) -> str:
    """Returns a name that seqio accepts, the same for the same identity only."""
    digest = hashlib.sha256(repr((text, *identity)).encode()).hexdigest()
    return re.sub(r"\W+", "_", f"{text} {digest[:8]}")


def add_task(source: str, tokenizer_path: str, number: int = 0) -> str:
    """Registers the seqio task of a source, unless it is there already, and returns its name.

    With sequence_length={"tokens": T} its dataset holds packed rows {"tokens": int32 [T], "bad":
    string}. Otherwise it holds documents {"tokens": int32 [n] without BOS, "bad": string}. "bad"
    says which documents are left out and why. It is empty as a rule.
    """
    provider = _data_source(source)
    name = _name(f"{number:03} {source}", fingerprint(tokenizer_path), provider.list_shards(SPLIT))
    if name not in seqio.TaskRegistry.names():
        tokenizer = Tokenizer(tokenizer_path)
        tokenize = functools.partial(_tokenize, source=source, tokenizer=tokenizer)
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
    # seqio mixes in the order of names: numbers keep it the same wherever the files lie.
    tasks = [add_task(source, tokenizer_path, number) for number, source in enumerate(sources)]
    rates = list(zip(tasks, weights, strict=True))
    name = _name("mixture", rates)
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, rates)
    return name


def _elements(dataset: tf.data.Dataset, sources: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the elements of a dataset. Raises UserError for a file that vanished or is damaged."""
    try:
        with text.reading(sources):
            yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:  # TensorFlow keeps no more than a line of the reader's own
        told = re.search(r"\b(UserError|Outage): (.*)", error.message)
        if told is None:
            raise
        kind, line = told.groups()
        if kind == "Outage":
            raise Outage(errno.ECONNABORTED, line, ", ".join(sources)) from None
        raise UserError(line) from None


def _text(lines: bytes) -> str:
    return lines.decode(errors="backslashreplace")


class Training(NamedTuple):
    """Serves `batches.Training` from text.

    Every process runs the whole pipeline and keeps its rows.
    """

    data: Any
    tokenizer_path: str

    def fingerprint(self) -> dict[str, str]:
        """Returns a digest of each source."""
        return {
            f"sources[{i}]": text.fingerprint(source) for i, source in enumerate(self.data.sources)
        }

    def batches(
        self, *, batch_size: int, seed: int, rows: np.ndarray, start_step: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns batches without end, as `batches.Training` does.

        They are a generator. Close it where the process ends before they are dropped: TensorFlow's
        threads may wait for Python for ever then.
        """
        data = self.data
        tokenizer = Tokenizer(self.tokenizer_path)
        bad = BadRecords(data.max_bad_records)
        mixture = seqio.MixtureRegistry.get(
            add_mixture(list(data.sources), list(data.weights), self.tokenizer_path)
        )
        # An endless repetition of nothing would never return.
        text.check_sources(data.sources, self.tokenizer_path, bad)
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
        every_batch = map(batch, elements)  # those before start_step too: their bad records count
        return (each for each in itertools.islice(every_batch, start_step, None))
