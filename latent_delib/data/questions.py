"""Questions with answers: a line of JSON becomes text that a decoder is trained on and asked.

A line is {"question": TEXT, "answer": TEXT}, and may have "steps". As text it is

    QUESTION
    Answer: ANSWER

or, where the steps are learned too, "Answer: STEPS #### ANSWER". It ends with a line break, at
which a generated answer stops. To ask in another form, change this file: training, evaluation and
`benchmark` take it from here.
"""

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from latent_delib.data import rows
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError

PROMPT_END = "Answer:"  # config.method.prompt_end of a job that is trained on questions
STEPS_END = "####"
STOP = "\n"
# The answer in a generated reply, with or without steps.
ANSWER = rf"^(?:.*{STEPS_END})?\s*(.*?)\s*$"
MOST_TOKENS = 512  # of a generated reply
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
        words = self.answer.split()
        if with_steps:
            words = [*self.steps.split(), STEPS_END, *words]
        return f" {' '.join(words)}{STOP}"


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
    return Question(row["question"], row["answer"], row.get("steps", ""))


def encode(line: bytes, with_steps: bool, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Returns the tokens of a line and why it is bad, as `rows.encode` does.

    The prompt is encoded by itself, as it is when the question is asked.
    """
    nothing = np.empty(0, np.int32)
    try:
        question = read(line, with_steps)
    except ValueError as error:
        return nothing, str(error)
    parts = []
    for text in (question.prompt(), question.reply(with_steps)):
        tokens, fault = rows.encode(text.encode(errors="surrogatepass"), tokenizer)
        if fault:
            return nothing, fault
        parts.append(tokens)
    end = tokenizer.encode(PROMPT_END)
    if parts[0][-len(end) :].tolist() != end:
        return nothing, f"the tokenizer joins {PROMPT_END!r} to the end of the question"
    return np.concatenate(parts), ""


def parted(tokens: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens of the prompt and of the reply, of tokens that `encode` made.

    Raises:
      UserError: they are of another form.
    """
    end = tokenizer.encode(PROMPT_END)
    for k in range(len(end), len(tokens)):
        prompt, reply = tokens[:k], tokens[k:]
        if prompt[-len(end) :] != end:
            continue
        # A reply is one line. Behind PROMPT_END in a question there are more.
        if tokenizer.decode(reply).count(STOP) == 1:
            return prompt, reply
    raise UserError(
        f"config.data: {tokenizer.decode(tokens)!r}: expected {PROMPT_END!r} and a line behind it; "
        "prepare the token files again"
    )


def answer_in(reply: str) -> str:
    """Returns the answer in a reply, which may have steps before it."""
    found = re.search(ANSWER, reply.removesuffix(STOP))
    return found[1] if found else ""


def room_for(replies: Iterable[str]) -> int:
    """Returns how many tokens suffice for each of some replies: a token is a byte at least.

    There is no more room than MOST_TOKENS.
    """
    longest = max((len(reply.encode()) for reply in replies), default=1)
    return min(longest, MOST_TOKENS)
