"""Makes training batches of text that is not prepared: a seqio mixture with a task per source.

This module imports TensorFlow. So it is imported only where training reads text, not token files.
"""

import hashlib
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from latent_delib.data import text
from latent_delib.data.rows import BadRecords, closed_at_exit, packed, segments
from latent_delib.data.sources import has_questions
from latent_delib.data.text import Reader
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import extra

with extra("seqio", ", up to Python 3.13; or run prepare first, which needs none of it"):
    from latent_delib.data.tensorflow import quiet, tf

    with quiet():
        import seqio

SPLIT = "train"  # the one split of every task: the source string says what is read
SHUFFLE_ROWS = 1000
ORDER = "2"  # version of the order of rows


def endless_documents(
    reader: Reader, tokenizer: Tokenizer, bad: BadRecords, key: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yields the tokens of a source's documents, epoch after epoch, int32 [n] without BOS.

    Each epoch has the parts of the source in another order, decided by `key`; within a part the
    order stays. Where one part is open at a time (see `Reader.cycle`), the parts keep their order
    too, because another machine may divide the source into other parts.
    """
    for epoch in itertools.count():
        parts = reader.parts
        if reader.cycle > 1:
            order = sorted(range(len(parts)), key=lambda i: _hash(*key, epoch, i))
            parts = [parts[i] for i in order]
        for document in text.documents(reader, tokenizer, bad, parts):
            yield document.tokens


def _hash(*key: int) -> bytes:
    return hashlib.sha256(repr(key).encode()).digest()


def make_task(
    reader: Reader,
    tokenizer: Tokenizer,
    length: int,
    bad: BadRecords,
    failed: list[Exception],
    seed: int,
    number: int = 0,
) -> seqio.Task:
    """Makes the task of a source: its packed rows without end, {"tokens": int32 [length]}.

    Args:
      failed: gets the error that ends the rows. TensorFlow raises another one in its place.
      seed, number: the seed of the job and the source's place in it, which decide the order.
    """

    def rows() -> Iterator[dict[str, np.ndarray]]:
        found = packed(
            endless_documents(reader, tokenizer, bad, (seed, number)),
            length=length,
            bos_id=tokenizer.bos_id,
            pad_id=tokenizer.pad_id,
            whole=has_questions(reader.source),
        )
        try:
            for row in itertools.chain.from_iterable(found):
                yield {"tokens": row}
        except Exception as error:
            failed.append(error)
            raise

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # the parts are in order already; seqio shuffles the rows
        signature = {"tokens": tf.TensorSpec([length], tf.int32)}
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    vocabulary = seqio.PassThroughVocabulary(tokenizer.vocab_size)  # the tokens are ids already
    return seqio.Task(
        f"source_{number:03}",  # seqio mixes in the order of names
        source=seqio.FunctionDataSource(dataset, [SPLIT]),
        preprocessors=[],
        output_features={"tokens": seqio.Feature(vocabulary, add_eos=False)},
        shuffle_buffer_size=SHUFFLE_ROWS,
    )


class Training:
    """Implements `batches.Training` with text.

    Every process runs the whole pipeline and keeps its own rows.
    """

    def __init__(self, data: Any, tokenizer: Tokenizer):
        self.data = data
        self.tokenizer = tokenizer
        self.readers = list(map(text.open_source, data.sources))
        self.num_rows = [0] * len(self.readers)  # not known

    def fingerprint(self) -> dict[str, str]:
        """Returns the order's version, a digest of each source, and how questions are packed."""
        found = {"order of text": ORDER}
        for i, reader in enumerate(self.readers):
            found[f"sources[{i}]"] = reader.fingerprint()
            if has_questions(reader.source):  # older versions cut questions anywhere
                found[f"packing of sources[{i}]"] = "whole"
        return found

    def batches(
        self, *, batch_size: int, seed: int, rows: np.ndarray, start_step: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns batches without end, as `batches.Training` does."""
        data, tokenizer = self.data, self.tokenizer
        bad = BadRecords(data.max_bad_records)
        failed: list[Exception] = []
        text.check_texts(self.readers, tokenizer, bad)
        tasks = [
            make_task(reader, tokenizer, data.seq_len, bad, failed, seed, number)
            for number, reader in enumerate(self.readers)
        ]
        mixture = seqio.Mixture("mixture", list(zip(tasks, data.weights, strict=True)))
        dataset = mixture.get_dataset(
            {"tokens": data.seq_len}, SPLIT, seed=seed, num_epochs=None, trim_output_features=False
        )

        def own_rows(element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            tokens = element["tokens"][rows]
            segment = segments(tokens, tokenizer.bos_id, tokenizer.pad_id)
            return {"tokens": tokens, "segment": segment}

        # At exit, TensorFlow would wait for its threads for ever.
        elements = closed_at_exit(_elements(dataset.batch(batch_size).prefetch(2), failed))
        return (own_rows(element) for element in itertools.islice(elements, start_step, None))


def _elements(
    dataset: tf.data.Dataset, failed: list[Exception]
) -> Generator[dict[str, np.ndarray]]:
    """Yields the elements of a dataset. Raises the error in `failed` that ended its rows."""
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError:
        if failed:
            raise failed[0] from None
        raise
