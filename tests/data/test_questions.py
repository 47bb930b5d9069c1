"""Questions and answers: a line of JSON as text, its tokens, and what is refused."""

import json
import re

import pytest

from latent_delib.data import questions
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.weights import folder

ROW = {"question": "What is 3 + 4?", "answer": "7", "steps": "3 + 4\nis 7,"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(folder.tokenizer_path(folder.locate("packaged")))


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
    tokens = questions.encode(line(), with_steps, tokenizer)
    assert tokenizer.decode(tokens.tolist()) == text
    prompt = tokenizer.encode("What is 3 + 4?\nAnswer:")
    assert tokens[: len(prompt)].tolist() == prompt
    assert prompt[-len(tokenizer.encode("Answer:")) :] == tokenizer.encode("Answer:")


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
        (line(answer=7), False, "'answer' is 7, expected text"),
        (line(question=" "), False, "'question' is ' '"),
        (json.dumps({"question": "q", "answer": "a"}).encode(), True, "'steps' is None"),
    ],
)
def test_a_line_of_another_form(tokenizer, bad, with_steps, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        questions.encode(bad, with_steps, tokenizer)
