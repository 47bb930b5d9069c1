"""Makes seqio tasks and mixtures of text sources, and training batches from them.

This module imports TensorFlow. So it is imported only where training reads text, not token files.
"""

import errno
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from latent_delib.data import text
from latent_delib.data.rows import BadRecords, grouped, pack, segments
from latent_delib.data.sources import has_questions
from latent_delib.data.text import Reader
from latent_delib.data.text_files import reading
from latent_delib.data.tokenizer import Tokenizer, fingerprint
from latent_delib.errors import Outage, UserError, extra

with extra("seqio", ", up to Python 3.13; or run prepare first, which needs none of it"):
    from latent_delib.data.tensorflow import quiet, tf

    with quiet():
        import seqio

SPLIT = "train"  # the one split of every task: the source string says what is read
SHUFFLE_DOCUMENTS = SHUFFLE_ROWS = 1000
_BLOCK = 256  # texts that TensorFlow takes from the reader at once


class _Source(seqio.FileDataSource):
    """Gives seqio the texts of a reader, part by part, as `text.Text`.

    Shuffles parts and documents, anew in each epoch, before seqio repeats the source.
    """

    def __init__(self, reader: Reader):
        texts = functools.partial(_texts_of_part, reader)
        parts = {SPLIT: reader.parts}
        super().__init__(texts, parts, cycle_length=reader.cycle, block_length=text.BLOCK)

    def list_shards(self, split):
        return self._split_to_filepattern[split]  # names, even if they look like patterns

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None):
        dataset = super().get_dataset(split, shuffle, seed, shard_info)
        return dataset.shuffle(SHUFFLE_DOCUMENTS, seed=seed) if shuffle else dataset


def _blocks(reader: Reader, part: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the contents and the numbers of the texts of a part, many at once."""
    texts = text.texts_of_part(reader, part.decode())
    for block in grouped(texts, _BLOCK):
        contents = np.array([found.content for found in block], object)
        yield contents, np.array([found.number for found in block])


def _texts_of_part(reader: Reader, part: tf.Tensor) -> tf.data.Dataset:
    """Makes a dataset of the texts of a part, as `text.Text`."""
    blocks = functools.partial(_blocks, reader)
    signature = (tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64))
    texts = tf.data.Dataset.from_generator(blocks, args=[part], output_signature=signature)
    texts = texts.unbatch()
    return texts.map(lambda content, number: text.Text(content, part, number)._asdict())


def _tokenize(dataset: tf.data.Dataset, reader: Reader, tokenizer: Tokenizer) -> tf.data.Dataset:
    """Tokenizes texts into {"tokens": int32 [n] without BOS, "bad": the fault, or empty}.

    Texts without a token are left out. Bad texts stay, without tokens, and are counted later.
    """

    def numpy_tokenize(content: bytes, part: bytes, number: int) -> tuple[np.ndarray, bytes]:
        found = text.Text(content, part.decode(), number)
        tokens, fault = text.tokens_of(reader, found, tokenizer)
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
    dataset: tf.data.Dataset, tokenizer: Tokenizer, whole: bool, sequence_length: Any = None
) -> tf.data.Dataset:
    """Packs documents into rows of sequence_length["tokens"] tokens; changes nothing without it.

    `whole` is as in `rows.pack`. "bad" of a row has a line for each bad document since the rows
    before it.
    """
    if sequence_length is None:
        return dataset
    length = sequence_length["tokens"]
    pack_one = functools.partial(
        pack, length=length, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id, whole=whole
    )

    def numpy_step(body: np.ndarray, lines: bytes, tokens: np.ndarray, bad: bytes) -> tuple:
        if bad:
            return body, lines + bad + b"\n", np.empty([0, length], np.int32), np.empty(0, object)
        rows, body = pack_one(body, tokens)
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
    """Returns a name that seqio accepts, which differs for each text and identity."""
    digest = hashlib.sha256(repr((text, *identity)).encode()).hexdigest()
    return re.sub(r"\W+", "_", f"{text} {digest[:8]}")


def add_task(reader: Reader, tokenizer_path: str, number: int = 0) -> str:
    """Registers the seqio task of a source, unless that is done already, and returns its name.

    With sequence_length={"tokens": T} its dataset holds packed rows {"tokens": int32 [T], "bad":
    string}. Otherwise it holds documents {"tokens": int32 [n] without BOS, "bad": string}. "bad"
    says which documents are left out and why; "" if there are none.
    """
    name = _name(f"{number:03} {reader.source}", fingerprint(tokenizer_path), reader.parts)
    if name not in seqio.TaskRegistry.names():
        tokenizer = Tokenizer(tokenizer_path)
        tokenize = functools.partial(_tokenize, reader=reader, tokenizer=tokenizer)
        whole = has_questions(reader.source)
        packed = functools.partial(_pack, tokenizer=tokenizer, whole=whole)
        vocabulary = seqio.PassThroughVocabulary(tokenizer.vocab_size)  # the tokens are ids already
        seqio.TaskRegistry.add(
            name,
            source=_Source(reader),
            preprocessors=[tokenize, packed],
            output_features={"tokens": seqio.Feature(vocabulary, add_eos=False)},
            shuffle_buffer_size=SHUFFLE_ROWS,
        )
    return name


def add_mixture(readers: list[Reader], weights: list[float], tokenizer_path: str) -> str:
    """Registers the seqio mixture that draws rows of sources by `weights`; returns its name."""
    # seqio mixes in the order of names: with numbers, the files' folders do not change the order.
    tasks = [add_task(reader, tokenizer_path, number) for number, reader in enumerate(readers)]
    rates = list(zip(tasks, weights, strict=True))
    name = _name("mixture", rates)
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, rates)
    return name


def _elements(dataset: tf.data.Dataset, sources: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the elements of a dataset. Raises UserError for a file that vanished or is damaged."""
    try:
        with reading(sources):
            yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:  # TensorFlow keeps one line of an error that a reader raised
        told = re.search(r"\b(UserError|Outage): (.*)", error.message)
        if told is None:
            raise
        kind, line = told.groups()
        if kind == "Outage":
            raise Outage(errno.ECONNABORTED, line, ", ".join(sources)) from None
        raise UserError(line) from None


class Training:
    """Implements `batches.Training` with text.

    Every process runs the whole pipeline and keeps its own rows.
    """

    def __init__(self, data: Any, tokenizer_path: str):
        self.data = data
        self.tokenizer_path = tokenizer_path
        self.readers = list(map(text.open_source, data.sources))

    def fingerprint(self) -> dict[str, str]:
        """Returns a digest of each source, and how its questions are packed."""
        found = {}
        for i, reader in enumerate(self.readers):
            found[f"sources[{i}]"] = reader.fingerprint()
            if has_questions(reader.source):  # older versions cut questions anywhere
                found[f"packing of sources[{i}]"] = "whole"
        return found

    def batches(
        self, *, batch_size: int, seed: int, rows: np.ndarray, start_step: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns batches without end, as `batches.Training` does.

        The result is a generator. Close it before the process ends: otherwise TensorFlow's threads
        may wait for Python for ever.
        """
        data = self.data
        tokenizer = Tokenizer(self.tokenizer_path)
        bad = BadRecords(data.max_bad_records)
        mixture = seqio.MixtureRegistry.get(
            add_mixture(self.readers, list(data.weights), self.tokenizer_path)
        )
        # An endless repetition of an empty source would never return.
        text.check_texts(self.readers, self.tokenizer_path, bad)
        dataset = mixture.get_dataset(
            {"tokens": data.seq_len},
            SPLIT,
            seed=seed,
            num_epochs=None,
            trim_output_features=False,
            passthrough_features=["bad"],
        )

        def batch(element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            lines = b"".join(element["bad"]).decode(errors="backslashreplace")
            for record in lines.split("\n")[:-1]:
                bad(record)
            tokens = element["tokens"][rows]
            return {
                "tokens": tokens,
                "segment": segments(tokens, tokenizer.bos_id, tokenizer.pad_id),
            }

        elements = _elements(dataset.batch(batch_size).prefetch(2), data.sources)
        # Reads the batches before start_step too, to count their bad records.
        every_batch = map(batch, elements)
        return (each for each in itertools.islice(every_batch, start_step, None))
