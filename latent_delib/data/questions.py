"""Questions with answers: a line of JSON becomes text that a decoder is trained on and asked.

A line is {"question": TEXT, "answer": TEXT}, and may have "steps". As text it is

    QUESTION
    Answer: ANSWER

or, where the steps are read too, "Answer: STEPS #### ANSWER". It ends with a line break, at
which a generated answer stops. To ask in another form, change this file: training, evaluation and
`benchmark` take it from here.
"""

import json
from typing import NamedTuple

import numpy as np

from latent_delib.data import rows
from latent_delib.data.tokenizer import Tokenizer

PROMPT_END = "Answer:"  # config.method.prompt_end of a job that is trained on questions
STEPS_END = "####"
STOP = "\n"
# The answer in a generated reply, with or without steps.
ANSWER = rf"^(?:.*{STEPS_END})?\s*(.*?)\s*$"
FORM = '{"question": TEXT, "answer": TEXT}'


class Question(NamedTuple):
    """Holds a question, its answer, and the steps that lead to it, "" where it has none."""

    question: str
    answer: str
    steps: str = ""

    def prompt(self) -> str:
        """Returns the text that is asked."""
        return f"{self.question}\n{PROMPT_END}"

    def reply(self, with_steps: bool) -> str:
        """Returns the text that is to follow, on one line."""
        return "".join(self.parts(with_steps)[1:])

    def parts(self, with_steps: bool) -> list[str]:
        """Returns prompt and reply in the parts that are encoded each by itself."""
        steps = []
        if with_steps:
            steps = [_words(self.steps), _words(STEPS_END)]
        return [self.prompt(), *steps, _words(self.answer) + STOP]


def _words(text: str) -> str:
    """Returns a text as it follows another one, on one line."""
    return f" {' '.join(text.split())}"


def steps_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens between the steps and the answer, as `encode` makes them."""
    return tuple(tokenizer.encode(_words(STEPS_END)))


def read(line: bytes, with_steps: bool) -> Question:
    """Reads a line of JSON.

    Raises:
      ValueError: it is not of the form, with the reason.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"not JSON of the form {FORM}")
    fields = ["question", "answer"]
    if with_steps:
        fields.append("steps")
    for field in fields:
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{field!r} is {value!r}, expected text in the form {FORM}")
    if with_steps and STEPS_END in row["steps"]:
        raise ValueError(f"'steps' holds {STEPS_END!r}, which is to follow them")
    return Question(row["question"], row["answer"], row.get("steps", ""))


def encode(line: bytes, with_steps: bool, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Returns the tokens of a line and why it is bad, as `rows.encode` does.

    The prompt is encoded by itself, as it is when the question is asked; so are the steps, their
    end and the answer, whose tokens are the same with and without steps.
    """
    nothing = np.empty(0, np.int32)
    try:
        question = read(line, with_steps)
    except ValueError as error:
        return nothing, str(error)
    parts = []
    for text in question.parts(with_steps):
        tokens, fault = rows.encode(text.encode(errors="surrogatepass"), tokenizer)
        if fault:
            return nothing, fault
        parts.append(tokens)
    end = tokenizer.encode(PROMPT_END)
    if parts[0][-len(end) :].tolist() != end:
        return nothing, f"the tokenizer joins {PROMPT_END!r} to the end of the question"
    return np.concatenate(parts), ""
