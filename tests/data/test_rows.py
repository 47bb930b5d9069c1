"""Documents to rows, segments and pieces, against literal arrays and a plain definition."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict

from latent_delib.data import rows
from latent_delib.data.batches import check
from latent_delib.data.rows import cut_pieces, segments
from latent_delib.errors import UserError

PAD, BOS = 0, 2


def packed(documents, length, whole=False):
    documents = [np.array(document, np.int32) for document in documents]
    blocks = list(rows.packed(documents, length=length, bos_id=BOS, pad_id=PAD, whole=whole))
    assert all(block.dtype == np.int32 for block in blocks)
    return np.concatenate(blocks).tolist()


def packed_token_by_token(documents, length):
    found = []

    def put(token):
        if not found or len(found[-1]) == length:
            found.append([BOS])
        if token != BOS or len(found[-1]) > 1:
            found[-1].append(token)

    for document in documents:
        for token in [BOS, *document]:
            put(token)
    found[-1] += [PAD] * (length - len(found[-1]))
    return found


def test_pack_literally():
    documents = [np.array(d) for d in ([10, 11, 12, 13, 14, 15], [20], [30, 31], [40, 41, 42])]
    assert packed(documents, 5) == [
        [2, 10, 11, 12, 13],
        [2, 14, 15, 2, 20],
        [2, 30, 31, 2, 40],  # a document that begins a row is led by the row's own BOS
        [2, 41, 42, 0, 0],
    ]
    assert packed([np.array([10, 11, 12]), np.array([20, 21])], 5) == [
        [2, 10, 11, 12, 2],
        [2, 20, 21, 0, 0],
    ]


def test_of_whole_documents_only_the_end_behind_a_row_is_left_out():
    documents = [np.array(d) for d in ([10, 11], [20, 21], [30], [40, 41, 42, 43, 44], [50])]
    assert packed(documents, 6, whole=True) == [
        [2, 10, 11, 2, 20, 21],
        [2, 30, 0, 0, 0, 0],
        [2, 40, 41, 42, 43, 44],
        [2, 50, 0, 0, 0, 0],
    ]
    documents = [np.array([10]), np.arange(20, 27), np.array([30])]
    assert packed(documents, 5, whole=True) == [
        [2, 10, 0, 0, 0],
        [2, 20, 21, 22, 23],
        [2, 30, 0, 0, 0],
    ]


@pytest.mark.parametrize("length", [2, 3, 7, 64])
def test_pack_equals_its_definition_and_keeps_every_token(length):
    random = np.random.default_rng(length)
    documents = [random.integers(3, 99, size) for size in random.integers(1, 40, 100)]
    found = packed(documents, length)
    assert found == packed_token_by_token(documents, length)
    flat = np.array(found).reshape(-1)
    np.testing.assert_array_equal(flat[flat > BOS], np.concatenate(documents))
    assert all(row[0] == BOS for row in found) and all(PAD not in row for row in found[:-1])


def test_segments_literally():
    tokens = np.array([[2, 5, 6, 2, 7, 2], [2, 2, 8, 9, 0, 0]])
    found = segments(tokens, BOS, PAD)
    np.testing.assert_array_equal(found, [[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 0, 0]])
    assert found.dtype == np.int32


def test_pieces_hold_every_token_once():
    document = np.arange(10, 17)
    assert [p.tolist() for p in cut_pieces(document, 4, BOS)] == [
        [2, 10, 11, 12],
        [2, 13, 14, 15],
        [2, 16],
    ]
    assert [p.tolist() for p in cut_pieces(document, 8, BOS)] == [[2, *range(10, 17)]]
    assert cut_pieces(document, 4, BOS)[0].dtype == np.int32


GOOD = {
    "sources": ("lines:a", "lines:b"),
    "weights": (1.0, 2.0),
    "validation": ("lines:c",),
    "seq_len": 8,
}
GOOD |= {"token_files": "", "max_bad_records": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": (), "weights": ()}, r"config\.data\.sources: empty"),
        (
            {"weights": (1.0,)},
            r"config\.data\.weights has 1, config\.data\.sources 2: expected one weight per source",
        ),
        ({"weights": (1.0, 0.0)}, r"config\.data\.weights: 0\.0 for 'lines:b'"),
        ({"weights": (-1.0, 1.0)}, r"config\.data\.weights: -1\.0 for 'lines:a'"),
        ({"weights": (float("nan"), 1.0)}, r"config\.data\.weights: nan for 'lines:a'"),
        ({"sources": ("lines:a", "lines:a")}, r"config\.data\.sources: 'lines:a' is listed twice"),
        (
            {"validation": ("lines:c", "lines:c")},
            r"config\.data\.validation: 'lines:c' is listed twice",
        ),
        (
            {"sources": ("lines:a", "packaged/trian")},
            "unknown source 'packaged/trian'",
        ),
        ({"validation": (1,)}, "source 1 is int, expected a string"),
        ({"validation": ("file:c",)}, "unknown source 'file:c'"),
        ({"sources": ("lines:a", 3)}, r"config\.data: source 3 is int, expected a string"),
        ({"seq_len": 1}, r"config\.data\.seq_len: 1"),
        ({"max_bad_records": -1}, r"config\.data\.max_bad_records: -1"),
    ],
)
def test_bad_mixtures(change, message):
    data = ConfigDict(GOOD | change)
    with pytest.raises(UserError, match=message):
        rows.check_data(data)


def test_no_validation():
    data = ConfigDict(GOOD | {"validation": ()})
    rows.check_data(data)
    with pytest.raises(UserError, match=r"config\.data\.validation: empty"):
        check(data, "validation")


def test_work_ahead_ends_with_its_user_and_hands_on_failures():
    def function(step):
        if step == 3:
            raise OSError("gone")
        return step

    running = threading.active_count()
    found = rows.map_in_threads(function, itertools.count(), threads=1, count=2)
    assert [next(found), next(found), next(found)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(found)
    found = rows.map_in_threads(function, itertools.count(5), threads=1, count=2)
    assert next(found) == 5 and threading.active_count() == running + 1
    found.close()
    assert threading.active_count() == running


@pytest.mark.parametrize("count", [1, 3, 50])
def test_work_ahead_keeps_the_order(count):
    squares = [number**2 for number in range(20)]
    assert list(rows.map_in_threads(lambda x: x**2, range(20), threads=3, count=count)) == squares
    assert list(rows.grouped([1, 1, 5, 1, 2, 1], 3, int)) == [[1, 1, 5], [1, 2], [1]]
    assert not list(rows.grouped([], 3, int))


def test_a_generator_that_is_open_when_python_ends_says_nothing():
    """As that of a script or notebook, at module level."""
    script = (
        "from latent_delib.data import rows\n"
        "loader = rows.map_in_threads(str, range(100), threads=2, count=4)\n"
        "print(next(loader))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
