"""Makes benchmarks that need no network: problems of reasoning-gym, and the packaged held-out text.

  python -m tools.make_tasks --out=runs/tasks

Writes for each task NAME.yaml, which the lm-eval harness reads, and NAME.test.jsonl. Where problems
can be made without end, writes NAME.train.jsonl too, for worked examples in prompts, and
text/train/NAME.txt, text/test/NAME.txt, both splits as text to adapt a model to
(`data.sources=files:OUT/text/train/*.txt`). No question is in both splits. Seeds and sizes are
fixed: the same version of reasoning-gym makes the same tasks. `benchmark` runs them.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from latent_delib.data.sources import CORPUS
from latent_delib.errors import UserError
from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import atomic_folder
from latent_delib.machine.progress import Progress
from latent_delib.machine.provenance import provenance
from tools import task_files

Row = dict[str, Any]

TEXT = CORPUS / "validation"
SIZES = {"train": 1000, "test": 200}
# problem i of seed s is problem 0 of seed s + i: far apart, or they overlap
SEEDS = {"train": 0, "test": 1_000_000}
PIECE = 1200  # characters of a piece of text, roughly
STATEMENT = re.compile(r"(All|No|Some) (\w+) are (not )?(\w+)")

# How the harness asks for each kind of row.
QUESTION = {"doc_to_text": "Question: {{question}}\nAnswer:"}
EXACT = {
    "metric": "exact_match",
    "aggregation": "mean",
    "higher_is_better": True,
    "ignore_case": True,
}
EXACT |= {"regexes_to_ignore": [",", "\\$", "(?s).*#### "]}  # what GSM8K's own task ignores


def _generated(until: list[str], max_gen_toks: int, pattern: str) -> Row:
    """Returns the harness settings of a task whose answer is the last match of `pattern`.

    The text is generated greedily.
    """
    found = [
        {"function": "regex", "regex_pattern": pattern, "group_select": -1},
        {"function": "take_first"},
    ]
    return {
        **QUESTION,
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": until, "max_gen_toks": max_gen_toks, "do_sample": False},
        "filter_list": [{"name": "answer", "filter": found}],
        "metric_list": [EXACT],
    }


def _chosen(**prompt: str) -> Row:
    """Returns the harness settings of a task whose answer is the likeliest of the choices."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    metrics = [{"metric": name, **mean} for name in ("acc", "acc_norm")]
    fixed = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }
    return {**prompt, **fixed, "metric_list": metrics}


SOLVED = _generated(["Question:"], 256, "#### (-?[0-9.,]+)")
NUMBER = _generated(["\n"], 16, "(-?[0-9]+)")
CHOICE = _chosen(**QUESTION)
CONTINUED = _chosen(doc_to_text="{{question}}")
READ = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": metric} for metric in ("bits_per_byte", "byte_perplexity", "word_perplexity")
    ],
}


def gsm_symbolic(split: str) -> Iterator[Row]:
    """Yields word problems in GSM8K's form: a worked answer that ends in "#### N", N an integer."""
    for item in _problems("gsm_symbolic", split):
        worked = item["metadata"]["answer_cot"]
        if re.fullmatch(r"(?s).*\n#### -?\d+", worked):
            yield {"question": item["question"], "answer": worked}


def chain_sum(split: str) -> Iterator[Row]:
    """Yields sums and differences of 2 to 6 numbers of up to 4 digits."""
    for item in _problems("chain_sum", split):
        yield {"question": item["question"], "answer": item["answer"]}


def basic_arithmetic(split: str) -> Iterator[Row]:
    """Yields the same with products, quotients and brackets, integers throughout."""
    for item in _problems("basic_arithmetic", split):
        if _value(item["metadata"]["expression"]) != int(item["answer"]):
            continue  # a rounded quotient: one in a hundred
        yield {"question": item["question"], "answer": item["answer"]}


def chain_sum_choice(split: str) -> Iterator[Row]:
    """Yields chain_sum's problems: the sum among three near misses."""
    draw = random.Random(SEEDS[split])
    for item in _problems("chain_sum", split):
        right = int(item["answer"])
        near = [right + sign * by for sign in (1, -1) for by in (1, 2, 10, 100)]
        yield _choices(draw, item["question"], str(right), [str(n) for n in draw.sample(near, 3)])


def countdown(split: str) -> Iterator[Row]:
    """Yields an expression that makes a number of given ones, among three that miss it.

    They differ in their operators.
    """
    draw = random.Random(SEEDS[split])
    for item in _problems("countdown", split):
        right = item["answer"].replace(" ", "")
        target = item["metadata"]["target"]
        operators = [m.end() for m in re.finditer(r"[\d)](?=[-+*/])", right)]  # not a sign
        wrong: set[str] = set()
        for _ in range(60):
            tried = list(right)
            for i in draw.sample(operators, min(2, len(operators))):
                tried[i] = draw.choice("+-*")
            expression = "".join(tried)
            if expression not in wrong | {right} and _value(expression) != target:
                wrong.add(expression)
            if len(wrong) == 3:
                question = f"Make {target} of {', '.join(map(str, item['metadata']['numbers']))}."
                yield _choices(draw, question, right, sorted(wrong))
                break


def syllogism(split: str) -> Iterator[Row]:
    """Yields two statements and a conclusion: whether it follows, Yes or No.

    The answers of reasoning-gym 0.1.25 are not used: it says Yes to some that do not follow, by an
    undistributed middle.
    """
    for item in _problems("syllogism", split):
        form = []
        terms: dict[str, int] = {}  # numbered as they come
        for key in ("premise1", "premise2", "conclusion"):
            how, subject, negated, predicate = STATEMENT.fullmatch(item["metadata"][key]).groups()
            numbers = [terms.setdefault(term, len(terms)) for term in (subject, predicate)]
            form.append((how, numbers[0], bool(negated), numbers[1]))
        yield {
            "question": item["question"],
            "choices": ["Yes", "No"],
            "gold": 0 if _follows(*form) else 1,
        }


def next_sentence(split: str) -> Iterator[Row]:
    """Yields the sentence after three others in held-out prose, among three of like length."""
    draw = random.Random(SEEDS[split])
    for path in sorted(TEXT.glob("prose_*.txt")):
        text = " ".join(path.read_text(encoding="utf-8").split())
        sentences = re.split(r"(?<=[a-z][.!?]) (?=[A-Z])", text)
        fitting = [i for i, s in enumerate(sentences) if 40 <= len(s) <= 400 and i >= 3]
        for i in sorted(draw.sample(fitting, min(SIZES[split] // 2, len(fitting)))):
            right = sentences[i]
            elsewhere = [j for j in fitting if abs(i - j) > 3]
            by_length = sorted(elsewhere, key=lambda j: abs(len(sentences[j]) - len(right)))
            wrong = [sentences[j] for j in draw.sample(by_length[:40], 3)]
            yield _choices(draw, " ".join(sentences[i - 3 : i]), right, wrong)


def held_out_text(split: str) -> Iterator[Row]:
    """Yields pieces of held-out prose and manuals, spread over them; cut between lines."""
    pieces = []
    for path in sorted(TEXT.glob("*.txt")):
        for document in path.read_text(encoding="utf-8").split("\f"):
            piece = ""
            for line in document.strip().splitlines(keepends=True):
                piece += line
                if len(piece) >= PIECE:
                    pieces.append({"text": piece})
                    piece = ""
    for i in range(SIZES[split]):
        yield pieces[i * len(pieces) // SIZES[split]]


# Task -> (maker of its rows, how the harness asks, splits).
TASKS: dict[str, tuple[Callable[[str], Iterator[Row]], Row, tuple[str, ...]]] = {
    "gsm_symbolic": (gsm_symbolic, SOLVED, ("train", "test")),
    "chain_sum": (chain_sum, NUMBER, ("train", "test")),
    "basic_arithmetic": (basic_arithmetic, NUMBER, ("train", "test")),
    "chain_sum_choice": (chain_sum_choice, CHOICE, ("train", "test")),
    "countdown": (countdown, CHOICE, ("train", "test")),
    "syllogism": (syllogism, CHOICE, ("train", "test")),
    "next_sentence": (next_sentence, CONTINUED, ("test",)),
    "held_out_text": (held_out_text, READ, ("test",)),
}


def make_tasks(out: str) -> None:
    """Writes all tasks to the folder `out`, whole or not at all.

    Raises:
      UserError: `out` is there already; reasoning-gym is not installed, or makes too few different
        problems.
    """
    version = _version()
    total = 0
    for _, _, splits in TASKS.values():
        total += sum(SIZES[split] for split in splits)
    progress = Progress("made", total, "problems")
    done = 0
    lines = []
    with atomic_folder(Path(out)) as folder:
        for name, (make, _, splits) in TASKS.items():
            made: dict[str, list[Row]] = {}
            seen: set[str] = set()  # the test split comes first: no question of it is taught
            for split in reversed(splits):
                rows = list(itertools.islice(_new(make(split), seen), SIZES[split]))
                if len(rows) < SIZES[split]:
                    raise UserError(
                        f"{name}: {len(rows)} {split} problems, expected {SIZES[split]}"
                    )
                made[split] = rows
                done += len(rows)
                progress(done)
                lines.append(f"{name:18} {split:6} {len(rows):>6,}")
            write_task(folder, name, made)
        about = {
            "seeds": SEEDS,
            "sizes": SIZES,
            "reasoning_gym": version,
            "provenance": provenance(computed=False),
        }
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    print("\n".join(lines))


def _new(rows: Iterator[Row], seen: set[str]) -> Iterator[Row]:
    """Yields rows whose question or text was not seen before, and adds it."""
    for row in rows:
        key = row.get("question", row.get("text"))
        if key not in seen:
            seen.add(key)
            yield row


def write_task(folder: Path, name: str, rows: dict[str, list[Row]]) -> None:
    """Writes a task of TASKS, whose rows are given by split, and its problems as text."""
    _, asked, _ = TASKS[name]
    task_files.write_task(folder, name, rows, asked)
    if "train" not in rows or name.endswith("_choice"):  # whose problems are another task's
        return
    for split, some in rows.items():
        text = folder / "text" / split / f"{name}.txt"
        task_files.write_documents(text, map(solved, some))


def solved(row: Row) -> str:
    """Returns a problem and its answer, as the harness puts them."""
    answer = row["answer"] if "answer" in row else row["choices"][row["gold"]]
    return f"Question: {row['question']}\nAnswer: {answer}"


def _version() -> str:
    try:
        return metadata.version("reasoning-gym")
    except metadata.PackageNotFoundError:
        raise UserError(
            "reasoning-gym is not installed: with a C compiler and Python's headers (on Debian: "
            "apt-get install gcc python3-dev) ./launch/setup.sh tasks brings it"
        ) from None


def _problems(dataset: str, split: str) -> Iterator[Row]:
    """Returns reasoning-gym's problems, twice as many as are wanted: some repeat or do not fit."""
    import reasoning_gym

    return iter(reasoning_gym.create_dataset(dataset, size=2 * SIZES[split], seed=SEEDS[split]))


def _choices(draw: random.Random, question: str, right: str, wrong: list[str]) -> Row:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"question": question, "choices": choices, "gold": choices.index(right)}


@functools.cache
def _follows(*form: tuple[str, int, bool, int]) -> bool:
    """Tells whether the last of three statements holds in every world where the others do.

    They are about three kinds of things. A world is a choice among the eight combinations of the
    kinds, with at least one thing of each kind.
    """

    def holds(
        world: Sequence[tuple[bool, ...]], how: str, subject: int, negated: bool, predicate: int
    ) -> bool:
        found = [thing[predicate] != negated for thing in world if thing[subject]]
        return {"All": all(found), "No": not any(found), "Some": any(found)}[how]

    things = list(itertools.product((False, True), repeat=3))
    *premises, conclusion = form
    for chosen in itertools.product((False, True), repeat=len(things)):
        world = list(itertools.compress(things, chosen))
        has_each_kind = len(world) > 0 and all(map(any, zip(*world)))
        if (
            has_each_kind
            and all(holds(world, *premise) for premise in premises)
            and not holds(world, *conclusion)
        ):
            return False
    return True


def _value(expression: str) -> Fraction | None:
    """Returns the value of whole numbers, + - * / and brackets; None for a division by zero."""
    assert re.fullmatch(r"[-+*/() \d]+", expression), expression
    try:
        return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression))
    except ZeroDivisionError:
        return None


if __name__ == "__main__":
    commands.run(
        lambda flags: make_tasks(flags.out), __doc__, out=(REQUIRED, "the folder to write")
    )
