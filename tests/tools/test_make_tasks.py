"""The offline tasks: the same everywhere, no test question taught, right answers right."""

import ast
import json
import operator
import re
from fractions import Fraction
from pathlib import Path

import pytest

import latent_delib as ld
from tools import make_tasks

STORED = json.loads((Path(__file__).parents[1] / "golden" / "harness.json").read_text())
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@pytest.fixture(scope="module")
def folder(once):
    """All tasks, smaller."""
    pytest.importorskip(
        "reasoning_gym", reason="reasoning-gym is not installed: setup.sh says when it is"
    )

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make_tasks, "SIZES", {"train": 120, "test": 200})
            make_tasks.make_tasks(str(folder / "tasks"))

    return once("made", make) / "tasks"


def rows(folder, name, split="test"):
    return [
        json.loads(line)
        for line in (folder / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def value(text):
    """What an expression comes to, exactly."""

    def visit(node):
        match node:
            case ast.BinOp(left, op, right):
                return OPERATORS[type(op)](visit(left), visit(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -visit(operand)
            case ast.Constant(n):
                return Fraction(n)
        raise AssertionError(ast.dump(node))

    return visit(ast.parse(text.strip(), mode="eval").body)


def comes_to(text):
    try:
        return value(text)
    except ZeroDivisionError:
        return None


def expression(row):
    """What a question of this form asks for: "State ... problem: 1 + 2 =", "Calculate 1 + 2."."""
    return re.fullmatch(r"[A-Z][a-z :]+([-(\d][-+*/() \d]*?)(?: =|\.)", row["question"])[1]


def sizes(folder):
    return {
        (n, s): len(rows(folder, n, s))
        for n, (_, _, splits) in make_tasks.TASKS.items()
        for s in splits
    }


def test_both_splits_as_text(folder):
    taught = [name for name, (_, _, splits) in make_tasks.TASKS.items() if "train" in splits]
    for split in ("train", "test"):
        texts = {
            file.stem: file.read_text(encoding="utf-8")
            for file in (folder / "text" / split).iterdir()
        }
        assert set(texts) == set(taught) - {"chain_sum_choice"}
        assert texts["chain_sum"].removesuffix("\n").split("\n\f\n") == [
            f"Question: {row['question']}\nAnswer: {row['answer']}"
            for row in rows(folder, "chain_sum", split)
        ]
        first = rows(folder, "countdown", split)[0]
        right = first["choices"][first["gold"]]
        assert texts["countdown"].startswith(
            f"Question: {first['question']}\nAnswer: {right}\n\f\n"
        )


def test_sizes(folder):
    assert sizes(folder) == {(n, s): 120 if s == "train" else 200 for n, s in sizes(folder)}
    about = json.loads((folder / "about.json").read_text())
    assert (
        about["sizes"]["test"] == 200
        and about["reasoning_gym"]
        and about["seeds"] == make_tasks.SEEDS
    )


def test_they_are_those_of_the_golden_values(folder):
    """Made on another day by another process; the packaged text was another then."""
    for name in ("gsm_symbolic", "syllogism"):
        for split, some in STORED[name]["rows"].items():
            assert rows(folder, name, split)[: len(some)] == some, (name, split)


def test_no_question_is_taught(folder):
    for name, (_, _, splits) in make_tasks.TASKS.items():
        asked = [
            row.get("question", row.get("text"))
            for split in splits
            for row in rows(folder, name, split)
        ]
        assert len(set(asked)) == len(asked), name


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "test"])
def test_arithmetic(folder, split):
    for name in ("chain_sum", "basic_arithmetic"):
        for row in rows(folder, name, split):
            assert value(expression(row)) == int(row["answer"]), row
            assert re.findall(
                make_tasks.NUMBER["filter_list"][0]["filter"][0]["regex_pattern"], row["answer"]
            )


@pytest.mark.parametrize("split", ["train", "test"])
def test_chosen_sums(folder, split):
    golds = []
    for row in rows(folder, "chain_sum_choice", split):
        assert [int(c) == value(expression(row)) for c in row["choices"]].index(True) == row["gold"]
        assert len(set(row["choices"])) == 4
        golds.append(row["gold"])
    assert min(golds.count(g) for g in range(4)) > len(golds) / 8  # no place is favoured


@pytest.mark.parametrize("split", ["train", "test"])
def test_countdown(folder, split):
    for row in rows(folder, "countdown", split):
        target, *numbers = map(int, re.findall(r"-?\d+", row["question"]))
        right = row["choices"][row["gold"]]
        assert value(right) == target and sorted(map(int, re.findall(r"\d+", right))) == sorted(
            numbers
        ), row
        assert all(comes_to(c) != target for c in row["choices"] if c != right)
        assert len(set(row["choices"])) == 4


def test_word_problems(folder):
    """The harness finds the answer; plain steps of the worked answers are right."""
    pattern, checked = make_tasks.SOLVED["filter_list"][0]["filter"][0]["regex_pattern"], 0
    for row in rows(folder, "gsm_symbolic"):
        (answer,) = re.findall(pattern, row["answer"])
        assert row["answer"].endswith(f"\n#### {answer}") and int(answer) == float(answer)
        for step, result in re.findall(
            r"(?:^|\n|[a-z] )(\d+(?: ?[-+*] ?\d+)+) ?= ?(\d+)(?=[ .]?\n| [a-z])", row["answer"]
        ):
            checked += 1
            assert value(step) == int(result), row
    assert checked > 100


# Of four figures, the moods that are valid where there are things of every kind.
MOODS = {
    1: "AAA EAE AII EIO AAI EAO",
    2: "EAE AEE EIO AOO AEO EAO",
    3: "AII IAI OAO EIO AAI EAO",
    4: "AEE IAI EIO AEO EAO AAI",
}


def follows(question):
    """As tradition has it. A conclusion may turn a premise around: No A are B, so no B are A."""
    statements = re.findall(r"(All|No|Some) (\w+) are (not )?(\w+)", question)
    letters = {("All", ""): "A", ("No", ""): "E", ("Some", ""): "I", ("Some", "not "): "O"}
    one, two, (mood, subject, predicate) = [
        (letters[how, no], a, b) for how, a, no, b in statements
    ]
    for major, minor in ((one, two), (two, one)):
        for premise in (major, minor):
            if premise[1:] == (predicate, subject) and (premise[0], mood) in {
                ("E", "E"),
                ("I", "I"),
                ("A", "I"),
                ("E", "O"),
            }:
                return True
            if premise[1:] == (subject, predicate) and (premise[0], mood) in {
                *zip("AEIO", "AEIO"),
                ("A", "I"),
                ("E", "O"),
            }:
                return True
        if (
            predicate in major
            and subject in minor
            and subject not in major
            and predicate not in minor
        ):
            figure = {(1, 2): 1, (2, 2): 2, (1, 1): 3, (2, 1): 4}[
                3 - major.index(predicate), 3 - minor.index(subject)
            ]
            if major[0] + minor[0] + mood in MOODS[figure].split():
                return True
    return False


@pytest.mark.parametrize("split", ["train", "test"])
def test_syllogisms(folder, split):
    golds = []
    for row in rows(folder, "syllogism", split):
        assert row["choices"] == ["Yes", "No"]
        assert (row["gold"] == 0) == follows(row["question"]), row
        golds.append(row["gold"])
    assert 0.3 < sum(golds) / len(golds) < 0.7


def test_next_sentence(folder):
    prose = {
        p: " ".join(p.read_text(encoding="utf-8").split())
        for p in make_tasks.TEXT.glob("prose_*.txt")
    }
    for row in rows(folder, "next_sentence"):
        right = row["choices"][row["gold"]]
        assert any(f"{row['question']} {right}" in text for text in prose.values())
        assert len(set(row["choices"])) == 4
        for wrong in set(row["choices"]) - {right}:
            assert not any(f"{row['question']} {wrong}" in text for text in prose.values())


def test_held_out_text(folder):
    texts = [p.read_text(encoding="utf-8") for p in make_tasks.TEXT.glob("*.txt")]
    found = [row["text"] for row in rows(folder, "held_out_text")]
    assert all(len(t) >= make_tasks.PIECE and any(t in text for text in texts) for t in found)
    assert all(any(t in text for t in found) for text in texts)  # of every work


def test_a_full_folder_and_a_missing_package_are_told(folder, tmp_path, monkeypatch):
    with pytest.raises(ld.UserError, match="tasks: already exists"):
        make_tasks.make_tasks(str(folder))
    monkeypatch.setattr(make_tasks.metadata, "version", _missing)
    with pytest.raises(ld.UserError, match="setup.sh tasks"):
        make_tasks.make_tasks(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _missing(name):
    raise make_tasks.metadata.PackageNotFoundError(name)
