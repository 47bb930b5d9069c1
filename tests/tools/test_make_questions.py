"""Questions: answers right by other means, steps that lead there, none twice, the same again."""

import itertools
import json
import re
from fractions import Fraction

import pytest

from tools import make_questions

TRAIN, TEST = 200, 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "questions"
    make_questions.make_questions(str(folder), TRAIN, TEST)
    return folder


def rows(folder, kind, split):
    lines = (folder / f"{kind}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_equations(steps, answer):
    """Each equation holds and goes on from the one before, on its left as a rule."""
    result = None
    for left, sign, right, found in re.findall(r"<<(\d+)([-+*/])(\d+)=(-?\d+)>>", steps):
        assert result in (None, left, right)
        assert eval(f"{left}{sign}{right}") == int(found)  # digits and a sign alone
        result = found
    assert result == answer


def formulas():
    """Every formula of a, b and c that takes each of them once, compiled."""
    found = []
    for (x, y, z), (s, t) in itertools.product(
        itertools.permutations("abc"), itertools.product("+-*/", repeat=2)
    ):
        found += [f"({x}{s}{y}){t}{z}", f"{x}{s}({y}{t}{z})"]
    return [compile(text, text, "eval") for text in found]


def values(found, *numbers):
    """What formulas make of three numbers; None where they divide by zero."""
    named = dict(zip("abc", map(Fraction, numbers)))
    made = []
    for formula in found:
        try:
            made.append(eval(formula, named.copy()))
        except ZeroDivisionError:
            made.append(None)
    return made


def reachable(facts, start):
    """The concepts that a path of rules leads to."""
    found, new = set(), {start}
    while new:
        found |= new
        new = {other for one, other in facts if one in new} - found
    return found


@pytest.mark.parametrize("kind", make_questions.KINDS)
def test_answers_and_steps_are_right_and_no_question_is_there_twice(folder, kind):
    both = rows(folder, kind, "train") + rows(folder, kind, "test")
    assert len({row["question"] for row in both}) == TRAIN + TEST
    for row in both:
        question, answer, steps = row["question"], row["answer"], row["steps"]
        if kind in ("arithmetic", "plus_minus"):
            assert eval(question.removeprefix("What is ").rstrip("?")) == int(answer)
        if kind == "hops":
            *places, a, b, c, count = re.findall(r"\d+", question)
            hop_on = str.maketrans("12345678", "".join(places))
            at = f"{a} {b} {c}"
            for hop, line in enumerate(steps.split("\n"), start=1):
                at = at.translate(hop_on)
                assert line == f"{hop}: {at}"
            assert (str(hop), at) == (count, answer)
            continue
        if kind == "countdown":
            target, *numbers = re.findall(r"\d+", question)
            assert eval(answer) == int(target)
            assert sorted(re.findall(r"\d+", answer)) == sorted(numbers)
            check_equations(steps, target)
            continue
        if kind != "chains":
            check_equations(steps, answer)
            continue
        name, start = re.search(r"(\w+) is a (\w+)\. Is", question).groups()
        facts = re.findall(r"Every (\w+) is a (\w+)\.", question)
        right, wrong = re.search(r"a (\w+) or a (\w+)\?", question).groups()
        if wrong in reachable(facts, start):
            right, wrong = wrong, right
        assert right in reachable(facts, start) and wrong not in reachable(facts, start)
        assert answer == f"{name} is a {right}."
        used = re.findall(r"Every (\w+) is a (\w+)\.", steps)
        assert used[0][0] == start and used[-1][1] == right and set(used) <= set(facts)
        assert all(one[1] == other[0] for one, other in zip(used, used[1:]))


def test_sums_have_three_to_five_numbers_of_one_digit_and_never_fall_below_zero(folder):
    both = rows(folder, "plus_minus", "train") + rows(folder, "plus_minus", "test")
    numbers = [re.findall(r"\d+", row["question"]) for row in both]
    assert {len(each) for each in numbers} == {3, 4, 5}
    assert {number for each in numbers for number in each} == set("123456789")
    assert all(int(found) >= 0 for row in both for found in re.findall(r"=(-?\d+)>", row["steps"]))


def test_word_problems_end_as_their_events_say(folder):
    signs = {"gets": "+", "gives": "-", "swaps": "*", "puts": "/"}
    for row in rows(folder, "word_problems", "test"):
        first, *events, _ = row["question"].split(". ")
        equations = re.findall(r"<<(\d+)(.)(\d+)=", row["steps"])
        assert equations[0][0] == re.search(r"\d+", first)[0]
        told = [(signs[event.split()[1]], re.search(r"\d+", event)[0]) for event in events]
        assert told == [(sign, by) for _, sign, by in equations]


def test_one_formula_alone_makes_a_number(folder):
    """All that do are equal for other numbers too; of some numbers not all targets are taken."""
    every = formulas()
    elsewhere = values(every, 1009, 2003, 499)
    for row in rows(folder, "countdown", "test")[:20]:
        target, *numbers = re.findall(r"\d+", row["question"])
        made = values(every, *numbers)
        alike = {other for value, other in zip(made, elsewhere) if value == int(target)}
        assert len(alike) == 1
    targets = make_questions._targets((4, 3, 2))
    assert 24 in targets and 14 not in targets, "which is (4+3)*2, and (4*3)+2"


def test_the_same_questions_are_made_again(folder, tmp_path):
    more = tmp_path / "questions"
    make_questions.make_questions(str(more), TRAIN + 50, TEST)
    for kind in make_questions.KINDS:
        assert rows(more, kind, "test") == rows(folder, kind, "test")
        assert rows(more, kind, "train")[:TRAIN] == rows(folder, kind, "train")
