"""Questions with answers: turns lines of JSON into text, to train a decoder and to ask it.

A line is {"question": TEXT, "answer": TEXT}, and may have "steps": a text with a step on each line,
or a list of steps. Empty lines are skipped. The text of a question is

    QUESTION
    Answer: ANSWER

or, where the steps are read too, "Answer: STEPS #### ANSWER". The text ends with a line break, at
which a generated answer stops. To ask in another form, change this file alone: training,
evaluation and `benchmark` all use it. A reply is right if its whole answer
equals the expected one.
"""

import json
import re
import reprlib
from collections.abc import Iterable
from typing import Any, NamedTuple

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
FIELDS = ("question", "answer")
FIELDS_WITH_STEPS = (*FIELDS, "steps")
FORM = '{"question": TEXT, "answer": TEXT}'
FORM_WITH_STEPS = '{"question": TEXT, "answer": TEXT, "steps": TEXT or a list of TEXT}'


class Question(NamedTuple):
    """Holds a question, its answer, and the steps that lead to the answer.

    steps: one step on each line; "" where there are none.
    """

    question: str
    answer: str
    steps: str = ""

    def prompt(self) -> str:
        """Returns the text that asks the question."""
        return f"{self.question}\n{PROMPT_END}"

    def reply(self, with_steps: bool) -> str:
        """Returns the text after the prompt, on one line."""
        return "".join(self.parts(with_steps)[1:])

    def parts(self, with_steps: bool, removed: int = 0) -> list[str]:
        """Returns prompt and reply, divided into the parts that are tokenized separately.

        removed: how many steps, from the first on, are left out.
        """
        parts = [self.prompt()]
        if with_steps:
            steps = [line for line in self.steps.split("\n") if line.strip()]
            if steps[removed:]:
                parts.append(_words(" ".join(steps[removed:])))
            parts.append(_words(STEPS_END))
        return [*parts, _words(self.answer) + STOP]


def _words(text: str) -> str:
    """Returns a text on one line, with a space before it."""
    return f" {' '.join(text.split())}"


def steps_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens between the steps and the answer, as `encode` makes them."""
    return tuple(tokenizer.encode_in_text(_words(STEPS_END)))


def line_of(question: Any, answer: Any, steps: Any = None) -> bytes:
    """Returns the line of JSON for the fields of a dataset's record.

    Without steps, these are the text before the last STEPS_END in the answer, as in GSM8K.
    """
    if steps is None and isinstance(answer, str):
        steps, _, answer = answer.rpartition(STEPS_END)
    return json.dumps({"question": question, "answer": answer, "steps": steps}).encode()


def read(line: bytes, with_steps: bool) -> Question:
    """Reads a line of JSON.

    Raises:
      ValueError: the line has another form; the message gives the reason.
    """
    form = FORM_WITH_STEPS if with_steps else FORM
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"not JSON of the form {form}")
    steps = row.get("steps")
    if isinstance(steps, list) and all(isinstance(step, str) for step in steps):
        row["steps"] = "\n".join(steps)
    for field in FIELDS_WITH_STEPS if with_steps else FIELDS:
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            found = reprlib.repr(value)
            raise ValueError(f"{field!r} is {found}, expected text in the form {form}")
    if STEPS_END in row["answer"]:
        raise ValueError(f"'answer' holds {STEPS_END!r}: put the text before it into 'steps'")
    # Where steps are not read, they only bound the length of a reply. So bad steps count as none.
    if not with_steps and not isinstance(row.get("steps"), str):
        row["steps"] = ""
    if with_steps and STEPS_END in row["steps"]:
        raise ValueError(f"'steps' holds {STEPS_END!r}, which marks their end")
    return Question(row["question"], row["answer"], row["steps"])


def encode(
    line: bytes, with_steps: bool, tokenizer: Tokenizer, removed: int = 0
) -> tuple[np.ndarray, str]:
    """Returns a line's tokens and its fault, as `rows.encode` does. An empty line has neither.

    The prompt, the steps, their end and the answer are tokenized separately. So the prompt has the
    same tokens when the question is asked, and the answer has the same with and without steps.

    Args:
      line: one line of JSON.
      with_steps: whether the reply has steps before the answer.
      tokenizer: the decoder's tokenizer.
      removed: how many steps, from the first on, are left out.
    """
    nothing = np.empty(0, np.int32)
    if not line.strip():
        return nothing, ""
    try:
        question = read(line, with_steps)
    except ValueError as error:
        return nothing, str(error)
    parts = []
    for number, text in enumerate(question.parts(with_steps, removed)):
        content = text.encode(errors="surrogatepass")
        decoded, fault = rows.decode(content)
        ids = tokenizer.encode_in_text(decoded) if number else tokenizer.encode(decoded)
        tokens, other_fault = rows.checked(ids, tokenizer)
        if fault or other_fault:
            return nothing, fault or other_fault
        parts.append(tokens)
    end = tokenizer.encode_in_text(PROMPT_END)
    if parts[0][-len(end) :].tolist() != end:
        return nothing, f"the tokenizer joins {PROMPT_END!r} to the end of the question"
    return np.concatenate(parts), ""


def parted(tokens: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Divides tokens that `encode` made; returns those of the prompt and those of the reply.

    A question may hold PROMPT_END itself. The prompt ends at the first one that one line follows.

    Raises:
      UserError: the tokens have another form.
    """
    end = tokenizer.encode_in_text(PROMPT_END)
    for k in range(len(end), len(tokens)):
        prompt, reply = tokens[:k], tokens[k:]
        if prompt[-len(end) :] != end:
            continue
        # A reply is one line. After an earlier PROMPT_END, inside the question, more lines follow.
        if tokenizer.decode(reply).count(STOP) == 1:
            return prompt, reply
    raise UserError(
        f"config.data: {tokenizer.decode(tokens)!r}: expected {PROMPT_END!r} and a line after it; "
        "prepare the token files again"
    )


def answer_in(reply: str) -> str:
    """Returns the answer in a reply, which may have steps before it."""
    found = re.search(ANSWER, reply.removesuffix(STOP))
    return found[1] if found else ""


def enough_tokens(replies: Iterable[str]) -> int:
    """Returns a number of tokens that is enough for each of these replies, at most MOST_TOKENS.

    The bytes of the longest reply are counted, because a token has at least one byte.
    """
    longest = max((len(reply.encode()) for reply in replies), default=1)
    return min(longest, MOST_TOKENS)
