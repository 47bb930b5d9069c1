"""A vocabulary: the same again, and what is refused."""

import pytest

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from tools.make_vocabulary import make_vocabulary

SIZE = 280  # with a piece for every byte


def test_a_vocabulary_of_a_text(tmp_path):
    (tmp_path / "1.txt").write_text("the cat sat on the mat\n" * 20)
    for out in ("a.model", "b.model"):
        make_vocabulary(f"{tmp_path}/*.txt", SIZE, str(tmp_path / out), 2e7)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert Tokenizer(str(tmp_path / "a.model")).vocab_size == SIZE
    (tmp_path / "1.txt").write_text("the cat sat on the mat " * 10_000)  # one line
    make_vocabulary(f"{tmp_path}/*.txt", SIZE, str(tmp_path / "long.model"), 2e7)
    assert len(Tokenizer(str(tmp_path / "long.model")).encode("the cat")) < len("the cat")
    with pytest.raises(UserError, match="--size=9999: .*"):
        make_vocabulary(f"{tmp_path}/*.txt", 9999, str(tmp_path / "c.model"), 2e7)


def test_bad_text_and_no_bytes_are_refused(tmp_path):
    (tmp_path / "1.txt").write_text("the cat\n")
    (tmp_path / "2.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="^--text: .*2.txt is not UTF-8"):
        make_vocabulary(f"{tmp_path}/*.txt", SIZE, str(tmp_path / "out"), 2e7)
    with pytest.raises(UserError, match="--num_bytes=0: expected at least 1"):
        make_vocabulary(f"{tmp_path}/*.txt", SIZE, str(tmp_path / "out"), 0)
