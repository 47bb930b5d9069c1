"""Questions and answers: a line of JSON as text, its tokens, and what is refused."""

import json
import re

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from latent_delib.data import batches, questions, text, token_files
from latent_delib.data.rows import BadRecords
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.job import preparation
from latent_delib.weights import locate, tokenizer_files

KINDS = {"qa": (False, 0), "qa_steps": (True, 0), "qa_steps-1": (True, 1)}
PACKAGED = {"decoder.path": "packaged", "decoder.tokenizer": "packaged"}
ROW = {"question": "What is 3 + 4?", "answer": "7", "steps": "3 + 4\nis 7,"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizer_files.tokenizer_path(locate.find_decoder("packaged")))


def line(**changes):
    return json.dumps(ROW | changes).encode()


@pytest.mark.parametrize(
    "with_steps, text",
    [
        (False, "What is 3 + 4?\nAnswer: 7\n"),
        (True, "What is 3 + 4?\nAnswer: 3 + 4 is 7, #### 7\n"),
    ],
)
def test_text_of_a_question(tokenizer, with_steps, text):
    tokens, fault = questions.encode(line(), with_steps, tokenizer)
    assert not fault
    assert tokenizer.decode(tokens.tolist()) == text
    prompt = tokenizer.encode("What is 3 + 4?\nAnswer:")
    assert tokens[: len(prompt)].tolist() == prompt
    assert prompt[-len(tokenizer.encode("Answer:")) :] == tokenizer.encode("Answer:")


def test_a_vocabulary_that_puts_a_space_before_each_text(tmp_path):
    """As Llama 2's: the end of the prompt has other tokens alone than after the question."""
    path = tokenizer_files.tokenizer_path(locate.find_decoder("packaged"))
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    spaced = Tokenizer(tmp_path / "tokenizer.model")
    end = spaced.encode_in_text("Answer:")
    assert end != spaced.encode("Answer:")
    tokens, fault = questions.encode(line(), True, spaced)
    assert not fault
    prompt, reply = questions.parted(tokens.tolist(), spaced)
    assert prompt == spaced.encode("What is 3 + 4?\nAnswer:")
    assert prompt[-len(end) :] == end
    words = Tokenizer(path)  # without such a space
    assert reply == words.encode(" 3 + 4 is 7,") + words.encode(" ####") + words.encode(" 7\n")
    assert tuple(words.encode(" ####")) == questions.steps_end(spaced)
    assert questions.answer_in(spaced.decode(reply)) == "7"


@pytest.mark.parametrize(
    "removed, reply", [(1, " is 7, #### 7\n"), (2, " #### 7\n"), (9, " #### 7\n")]
)
def test_steps_are_left_out_from_the_first_on(tokenizer, removed, reply):
    """The question stays as it was, and with all steps out the mark before the answer."""
    tokens, fault = questions.encode(line(), True, tokenizer, removed)
    assert not fault
    assert tokenizer.decode(tokens.tolist()) == f"What is 3 + 4?\nAnswer:{reply}"
    spaced = questions.read(line(steps="\n3 + 4\n \n\tis 7,\n"), True)
    assert "".join(spaced.parts(True, removed)[1:]) == reply
    listed = questions.read(line(steps=["3 + 4", "is 7,"]), True)
    assert listed == questions.read(line(), True)


def test_steps_that_are_not_read_may_have_any_form():
    for steps, kept in ((None, ""), (7, ""), ([1, 2], ""), ("3 #### 4", "3 #### 4")):
        assert questions.read(line(steps=steps), False) == ("What is 3 + 4?", "7", kept)


def test_the_answer_has_the_same_tokens_with_and_without_steps(tokenizer):
    """So latents that stand for the steps are asked for the answer as it is learned."""
    whole, _ = questions.encode(line(), True, tokenizer)
    short, _ = questions.encode(line(), False, tokenizer)
    prompt = tokenizer.encode("What is 3 + 4?\nAnswer:")
    answer = short[len(prompt) :].tolist()
    end = questions.steps_end(tokenizer)
    assert whole[-len(answer) :].tolist() == answer
    assert tuple(whole[-len(answer) - len(end) : -len(answer)]) == end


@pytest.mark.parametrize("with_steps", [False, True])
def test_the_answer_is_found_in_a_reply(with_steps):
    for answer in ("7", "a green hill", "#7"):
        question = questions.read(line(answer=answer), with_steps)
        reply = question.reply(with_steps).removesuffix(questions.STOP)
        assert re.findall(questions.ANSWER, reply) == [answer]


@pytest.mark.parametrize(
    "bad, with_steps, why",
    [
        (b"{", False, "not JSON of the form"),
        (b"[1]", False, "not JSON of the form"),
        (b'{"question": "caf\xe9", "answer": "a"}', False, "not UTF-8 text"),
        (line(steps=None).decode().encode("utf-16"), True, "not UTF-8 text"),
        (line(answer=7), False, "'answer' is 7, expected text"),
        (line(question=" "), False, "'question' is ' '"),
        (json.dumps({"question": "q", "answer": "a"}).encode(), True, "'steps' is None, expected"),
        (line(steps=None), True, '"steps": TEXT or a list of TEXT}'),
        (line(steps=["3", None]), True, "'steps' is ['3', None], expected text"),
        (line(steps="3 #### 4"), True, "'steps' holds '####'"),
        (line(steps=["3", "####"]), True, "'steps' holds '####'"),
        (line(steps=[]), True, "'steps' is '', expected text"),
        (line(steps=7), True, "'steps' is 7, expected text"),
        (line(answer="3 and 4 #### 7"), False, "'answer' holds '####': put the text before it"),
        (line(answer=7 * [999999999]), False, "9, ...], expected text"),
        (line(answer="\ud800"), False, "not UTF-8"),
        (line(question="a\0"), False, "holds NUL"),
    ],
)
def test_a_line_of_another_form(tokenizer, bad, with_steps, why):
    tokens, fault = questions.encode(bad, with_steps, tokenizer)
    assert len(tokens) == 0 and why in fault


def test_tokens_of_another_form(tokenizer):
    tokens, _ = questions.encode(line(), False, tokenizer)
    prompt, reply = questions.parted(tokens.tolist(), tokenizer)
    assert prompt + reply == tokens.tolist()
    for bad in (prompt, tokenizer.encode("the cat\nAnswer: 7\nand a dog\n")):
        with pytest.raises(UserError, match="'Answer:' and a line after it"):
            questions.parted(bad, tokenizer)


def test_questions_are_kept_whole(tmp_path, tokenizer, make_config):
    """Token files, seqio and the rows of a validation; what is asked always stands in one row."""
    pytest.importorskip("seqio")
    from latent_delib.data import tasks

    file = tmp_path / "mine.jsonl"
    answers = [str(10**i) for i in range(12)]
    file.write_bytes(b"\n".join(line(answer=answer) for answer in answers))
    source = f"qa:{file}"
    changes = {"data.sources": (source,), "data.validation": (source,), "data.seq_len": 64}
    config = make_config(changes | {"data.token_files": ""} | PACKAGED)
    folder_of_tokens = str(tmp_path / "tokens")
    meta = preparation.prepare(config, folder_of_tokens)

    def of_token_files():
        data = make_config(changes | {"data.token_files": folder_of_tokens}).data
        count = meta["train"][0]["rows"]
        every = token_files.Training(data, tokenizer).batches(
            batch_size=count, seed=0, rows=np.arange(count), start_step=0
        )
        yield from next(every)["tokens"]

    def of_seqio():
        made = text.open_source(source), tokenizer, 64, BadRecords(0)
        rows = tasks.make_task(*made, failed=[], seed=0).get_dataset(
            {"tokens": 64}, "train", shuffle=False
        )
        yield from (row["tokens"] for row in rows.take(30).as_numpy_iterator())

    def of_validation():
        yield from batches.validation_rows(config.data, tokenizer=tokenizer, count=12)["tokens"]

    wanted = [questions.encode(line(answer=a), False, tokenizer)[0].tolist() for a in answers]
    for rows in (of_token_files(), of_seqio(), of_validation()):
        found = []
        for row in rows:
            pieces = np.split(row, np.flatnonzero(row == tokenizer.bos_id))[1:]
            found += [[int(t) for t in piece[1:] if t != tokenizer.pad_id] for piece in pieces]
        # seqio's rows have no end, so the last one may hold the beginning of a question
        count = len(found) // len(wanted)
        assert sorted(found[: count * len(wanted)]) == sorted(wanted * count) and count


def test_of_a_question_longer_than_a_row_the_end_is_left_out(tmp_path, make_config, capsys):
    """No row has an answer without its question, and `prepare` counts what it has cut."""
    file = tmp_path / "mine.jsonl"
    file.write_bytes(line(question="one two three " * 20) + b"\n" + line())
    changes = {"data.sources": (f"qa:{file}",), "data.validation": (f"qa:{file}",)}
    changes |= {"data.seq_len": 32, "data.token_files": ""} | PACKAGED
    folder_of_tokens = tmp_path / "tokens"
    meta = preparation.prepare(make_config(changes), str(folder_of_tokens))
    assert [meta["train"][0][key] for key in ("documents", "rows", "cut")] == [2, 2, 1]
    assert "2 documents" in capsys.readouterr().out
    # Token files of an older version, which cut questions anywhere, are not taken for these.
    del meta["train"][0]["whole"]
    (folder_of_tokens / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="an older version split questions of qa:"):
        preparation.prepare(make_config(changes), str(folder_of_tokens))


def test_a_source_of_questions(tmp_path, tokenizer):
    """As `prepare` reads it: a document per line, bad ones named; prompts end with PROMPT_END."""
    file = tmp_path / "mine.jsonl"
    file.write_bytes(line() + b"\n{}\n" + line(answer="8") + b"\n \r\n\n")
    for kind, (with_steps, removed) in KINDS.items():
        reader = text.open_source(f"{kind}:{tmp_path}/*.jsonl")
        bad = []
        found = list(text.documents(reader, tokenizer, bad.append))
        for document, answer in zip(found, ("7", "8"), strict=True):
            tokens, _ = questions.encode(line(answer=answer), with_steps, tokenizer, removed)
            assert document.tokens.tolist() == tokens.tolist() and document.work == ""
        (fault,) = bad
        assert fault.startswith(f"{file}: line 2: 'question' is None")
    digests = {text.open_source(f"{kind}:{file}").fingerprint() for kind in KINDS}
    assert len(digests) == len(KINDS)
    for source in ("qa_steps-:x", "qa_steps-two:x", "qa-1:x", "qa_steps-1:"):
        with pytest.raises(UserError, match=r"unknown source .* qa_steps\[-K\]:GLOB"):
            text.open_source(source)
