"""Problems: the same everywhere, none twice, right answers right."""

import itertools
import json
import re

import pytest

from latent_delib.errors import UserError
from tools import make_problems, make_questions

TRAIN, TEST = 300, 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "problems"
    make_problems.make_problems(str(folder), list(make_problems.KINDS), TRAIN, TEST)
    return folder


def documents(folder, split, kind):
    text = (folder / "text" / split / f"{kind}.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\f\n")


def solve(question):
    """Answers a question in another way than its maker."""
    kind, _, rest = question.rstrip("=").partition(" ")
    if kind == "sum":
        return str(sum(map(int, rest.split())))
    if kind == "sort":
        return " ".join(sorted(rest.split()))  # all of two digits
    if kind == "look":
        pairs, names = rest.removeprefix("up ").split("; ")
        return str(sum(int(re.search(rf"{name}(\d)", pairs)[1]) for name in names.split("+")))
    if kind == "follow":  # and far
        places, steps, asked = re.fullmatch(r"(.+); (\d): (.+)", rest).groups()
        table = dict(enumerate(places.split(), 1))
        answers = []
        for place in asked.split():
            for _ in range(int(steps)):
                place = table[int(place)]
            answers.append(place)
        return " ".join(answers)
    while re.search(r"\(\)|\[\]|{}", rest):
        rest = re.sub(r"\(\)|\[\]|{}", "", rest)
    return rest[::-1].translate(str.maketrans("([{", ")]}"))


@pytest.mark.parametrize("kind", make_problems.KINDS)
def test_answers_are_right_and_no_problem_is_there_twice(folder, kind):
    both = documents(folder, "train", kind) + documents(folder, "test", kind)
    assert len(set(both)) == TRAIN + TEST
    for document in both:
        question, answer = re.fullmatch(r"(.+=)(.+)\.", document).groups()
        assert solve(question) == answer, document


BENCHMARKS = {kind: [kind] for kind in make_problems.KINDS}
BENCHMARKS["follow"] = ["follow_1", "follow_2", "follow_3"]  # one per number of steps
BENCHMARKS["far"] = ["follow_4", "follow_5", "follow_6"]


@pytest.mark.parametrize("kind", make_problems.KINDS)
def test_the_harness_asks_the_problems_of_the_test_split(folder, kind):
    harness_tasks = pytest.importorskip("latent_delib.measure.harness_tasks")
    texts = []
    for name in BENCHMARKS[kind]:
        task = harness_tasks.load_local_task(name, str(folder))["tasks"][name]
        asked = list(task.test_docs())
        texts += [task.doc_to_text(row) + task.doc_to_target(row) + "." for row in asked]
        assert all(name == make_problems.benchmark_of(kind, row["question"]) for row in asked)
    assert sorted(texts) == sorted(documents(folder, "test", kind))


def test_the_same_problems_are_made_again_and_more_to_train_on_change_no_test(folder, tmp_path):
    more = tmp_path / "problems"
    make_problems.make_problems(str(more), list(make_problems.KINDS), TRAIN + 50, TEST)
    for kind in make_problems.KINDS:
        assert documents(more, "train", kind)[:TRAIN] == documents(folder, "train", kind)
        for name in BENCHMARKS[kind]:
            file = f"{name}.test.jsonl"
            assert (more / file).read_bytes() == (folder / file).read_bytes()
            assert len(json.loads((more / file).read_text().splitlines()[0])) == 2


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(UserError, match="'folow': expected some of sums, .*follow"):
        make_problems.make_problems(str(tmp_path / "made"), ["folow"], TRAIN, TEST)


@pytest.mark.parametrize("counts", [(-1, TEST), (TRAIN, -1)])
def test_counts_below_nothing_are_refused(counts, tmp_path):
    with pytest.raises(UserError, match="--t(rain|est)=-1: expected at least 0"):
        make_problems.make_problems(str(tmp_path / "made"), ["sums"], *counts)
    with pytest.raises(UserError, match="--t(rain|est)=-1: expected at least 0"):
        make_questions.make_questions(str(tmp_path / "made"), *counts)


def test_no_more_are_asked_for_than_there_are():
    """The tenth of ten digits is found; an eleventh is looked for in vain, and not for ever."""
    digits = make_problems.different("digits", lambda draw: (draw.randint(0, 9),))
    assert sorted(problem for (problem,) in itertools.islice(digits, 10)) == list(range(10))
    with pytest.raises(UserError, match="digits: .* more than 10 different"):
        next(digits)
