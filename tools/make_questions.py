"""Makes questions that need several steps, with their steps and answers, in JSON lines.

  python -m tools.make_questions --out=runs/questions

  arithmetic     "What is 47 * 86 - 12?", the steps "<<47*86=4042>>" and "<<4042-12=4030>>", the
                 answer "4030"
  word_problems  how many things someone has after two to four events, steps as above; the form of
                 GSM8K-aug (2405.14838)
  chains         a path in a graph of invented concepts, in ProsQA's form (2412.06769): "Every
                 lempus is a rimpus. ... Ann is a lempus. Is Ann a zorpus or a gompus?"
  countdown      "Make 28 of 24, 8 and 2.", steps "<<8/2=4>> <<24+4=28>>", answer "24+(8/2)"; the
                 task of Stream of Search (2404.03683), with three numbers and one right answer
  hops           "Follow 5 7 1 2 5 2 5 8 from 3 4 6, 2 hops.": place 3 holds 1, place 1 holds 5, and
                 so on for 4 and 6; the steps "1: 1 2 2" and "2: 5 7 7", the answer "5 7 7"
  plus_minus     "What is 4 + 7 - 3?" with three to five numbers of one digit, the steps
                 "<<4+7=11>>" and "<<11-3=8>>", the answer "8"

Writes KIND.train.jsonl and KIND.test.jsonl, lines of {"question", "steps", "answer"}, for the
sources qa:FILE and qa_steps:FILE and for `benchmark --benchmarks=qa:FILE`. Each step is a line of
"steps". No question is there twice. The same counts give the same files.
"""

import functools
import itertools
import json
import operator
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from latent_delib.data.questions import Question
from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import atomic_folder
from tools.make_problems import drawn

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "June")
THINGS = "apples books coins eggs keys letters pens shells stamps tickets".split()
EVENTS = {  # how a number of things changes
    "+": "{name} gets {by} more.",
    "-": "{name} gives {by} away.",
    "*": "{name} swaps each of them for {by} smaller ones.",
    "/": "{name} puts them into {by} equal heaps and keeps one heap.",
}
FIRST = ("bro", "gom", "jel", "lem", "rim", "ster", "tum", "vim", "wor", "yim", "zor", "zum")
LAST = ("bus", "dus", "gus", "mus", "pus")
OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
# Stand for the three numbers, to tell formulas apart: no two formulas make the same of these.
OTHERS = (Fraction(1009, 7), Fraction(2003, 11), Fraction(499, 13))


def arithmetic(draw: random.Random) -> Question:
    """Multiplies two numbers of two digits, and adds or takes away a third."""
    a, b, c = draw.choices(range(10, 100), k=3)
    sign = draw.choice("+-")
    product = a * b
    answer = product + c if sign == "+" else product - c
    steps = f"<<{a}*{b}={product}>>\n<<{product}{sign}{c}={answer}>>"
    return Question(f"What is {a} * {b} {sign} {c}?", str(answer), steps)


def word_problems(draw: random.Random) -> Question:
    """Tells of two to four events that change how many things someone has."""
    name = draw.choice(NAMES)
    things = draw.choice(THINGS)
    count = draw.randint(3, 40)
    sentences = [f"{name} has {count} {things}."]
    steps = []
    for _ in range(draw.randint(2, 4)):
        sign, by, after = _event(draw, count)
        sentences.append(EVENTS[sign].format(name=name, by=by))
        steps.append(f"<<{count}{sign}{by}={after}>>")
        count = after
    sentences.append(f"How many {things} does {name} have now?")
    return Question(" ".join(sentences), str(count), "\n".join(steps))


def _event(draw: random.Random, count: int) -> tuple[str, int, int]:
    """Draws a sign and a number that fit a count; returns them and the count that they make."""
    numbers: dict[str, Sequence[int]] = {"+": range(2, 31)}
    if count > 2:
        numbers["-"] = range(1, count)
    if count < 100:
        numbers["*"] = range(2, 6)
    divisors = [by for by in range(2, 7) if count % by == 0]
    if divisors:
        numbers["/"] = divisors
    sign = draw.choice(list(numbers))
    by = draw.choice(numbers[sign])
    return sign, by, int(OPERATIONS[sign](count, by))


def chains(draw: random.Random) -> Question:
    """Asks which of two concepts someone belongs to, three to five steps away.

    The right one ends a path from the concept that is named first. Each concept of the path also
    leads astray. The wrong one ends a path of the same length that begins elsewhere.
    """
    length = draw.randint(3, 5)
    concepts = [first + last for first in FIRST for last in LAST]
    draw.shuffle(concepts)
    path, concepts = concepts[: length + 1], concepts[length + 1 :]
    other, concepts = concepts[: length + 1], concepts[length + 1 :]
    astray = list(zip([*path[:-1], *other[:-1]], concepts))
    name = draw.choice(NAMES)
    rules = [_rule(*pair) for pair in itertools.pairwise(path)]
    others = [_rule(*pair) for pair in [*itertools.pairwise(other), *astray]]
    facts = [*rules, *others]
    draw.shuffle(facts)
    is_a = f"{name} is a {path[0]}."
    choices = [path[-1], other[-1]]
    draw.shuffle(choices)
    question = f"{' '.join(facts)} {is_a} Is {name} a {choices[0]} or a {choices[1]}?"
    return Question(question, f"{name} is a {path[-1]}.", "\n".join([is_a, *rules]))


def _rule(one: str, other: str) -> str:
    return f"Every {one} is a {other}."


def countdown(draw: random.Random) -> Question:
    """Asks to make a number of three others, each used once, which one formula alone does.

    Of the ways to write it the answer is the first of `_terms`, so there is one right answer.
    """
    numbers = tuple(sorted(draw.sample(range(2, 31), 3), reverse=True))
    targets = _targets(numbers)
    target = draw.choice(list(targets))
    first, second, third = numbers
    question = f"Make {target} of {first}, {second} and {third}."
    made = targets[target]
    return Question(question, made.text[1:-1], " ".join(made.steps))


class Term(NamedTuple):
    """Holds a number or what was made of several.

    value: what it is, at least 1. other: the same formula of OTHERS. text: with brackets.
    steps: the equations that made it.
    """

    value: int
    other: Fraction
    text: str
    steps: tuple[str, ...] = ()


@functools.cache
def _targets(numbers: tuple[int, int, int]) -> dict[int, Term]:
    """Returns what one formula alone makes of three different numbers, and its first form."""
    found: dict[int, dict[Fraction, Term]] = defaultdict(dict)
    for term in _terms([Term(n, other, str(n)) for n, other in zip(numbers, OTHERS)]):
        found[term.value].setdefault(term.other, term)
    targets = {}
    for target, formulas in found.items():
        if len(formulas) == 1:
            (targets[target],) = formulas.values()
    return targets


def _terms(terms: list[Term]) -> Iterator[Term]:
    """Yields every term that takes in all of these, the larger one first in each operation.

    All between are whole numbers from 1.
    """
    if len(terms) == 1:
        yield terms[0]
    for pair in itertools.combinations(terms, 2):
        rest = [term for term in terms if term not in pair]
        for sign in OPERATIONS:
            made = _combined(*sorted(pair, reverse=True), sign)
            if made:
                yield from _terms([*rest, made])


def _combined(a: Term, b: Term, sign: str) -> Term | None:
    """Returns a SIGN b; None where it is no whole number from 1."""
    value = OPERATIONS[sign](Fraction(a.value), b.value)
    if value < 1 or value.denominator > 1:
        return None
    step = f"<<{a.value}{sign}{b.value}={value}>>"
    return Term(
        int(value),
        OPERATIONS[sign](a.other, b.other),
        f"({a.text}{sign}{b.text})",
        (*a.steps, *b.steps, step),
    )


def hops(draw: random.Random) -> Question:
    """Follows eight places, each of which holds another's number, from three of them."""
    places = draw.choices("12345678", k=8)
    start = draw.choices("12345678", k=3)
    count = draw.randint(2, 5)
    at = start
    steps = []
    for hop in range(1, count + 1):
        at = [places[int(place) - 1] for place in at]
        steps.append(f"{hop}: {' '.join(at)}")
    question = f"Follow {' '.join(places)} from {' '.join(start)}, {count} hops."
    return Question(question, " ".join(at), "\n".join(steps))


def plus_minus(draw: random.Random) -> Question:
    """Adds and takes away two to four numbers of one digit, never to less than 0."""
    count = draw.randint(1, 9)
    text = str(count)
    steps = []
    for _ in range(draw.randint(2, 4)):
        by = draw.randint(1, 9)
        sign = draw.choice("+-") if by <= count else "+"
        after = count + by if sign == "+" else count - by
        text += f" {sign} {by}"
        steps.append(f"<<{count}{sign}{by}={after}>>")
        count = after
    return Question(f"What is {text}?", str(count), "\n".join(steps))


KINDS = {
    make.__name__: make for make in (arithmetic, word_problems, chains, countdown, hops, plus_minus)
}


def make_questions(out: str, train: int, test: int) -> None:
    """Writes questions of every kind to the folder `out`, whole or not at all.

    Args:
      out: the folder, which must not exist.
      train, test: questions of each kind, as in `drawn`.

    Raises:
      UserError: as `drawn`.
    """
    with atomic_folder(Path(out)) as folder:
        for kind, split, questions in drawn(KINDS, train, test, "questions"):
            lines = [json.dumps(question._asdict()) + "\n" for question in questions]
            (folder / f"{kind}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    commands.run(
        lambda flags: make_questions(flags.out, flags.train, flags.test),
        __doc__,
        out=(REQUIRED, "the folder to write"),
        train=(50_000, "questions of each kind to train on"),
        test=(500, "questions of each kind to test on"),
    )
