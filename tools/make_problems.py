"""Makes problems that a small decoder half solves: text to train on, and a benchmark of each kind.

  python -m tools.make_problems --out=runs/problems

  sums      sum 7 5 9 3 8 8 1 9 4=54.
  sorting   sort 73 91 50 46 82=46 50 73 82 91.
  look_ups  look up a7 b3 c9 d4; b+d=7.
  brackets  close {[](=)}.                  what is still open

Writes for each kind text/train/KIND.txt and text/test/KIND.txt, documents of one problem each, and
KIND.yaml and KIND.test.jsonl, which the lm-eval harness reads; configs/problems.py is their table
for `benchmark`. No problem is there twice. The same counts give the same files.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import whole
from latent_delib.machine.progress import Progress

Problem = tuple[str, str]  # question, answer

NAMES = "abcdefghij"
PAIRS = {"(": ")", "[": "]", "{": "}"}


def sums(draw: random.Random) -> Problem:
    """Adds eight to twenty numbers of one digit."""
    numbers = draw.choices(range(1, 10), k=draw.randint(8, 20))
    return f"sum {_list(numbers)}=", str(sum(numbers))


def sorting(draw: random.Random) -> Problem:
    """Sorts six to nine numbers of two digits."""
    numbers = draw.choices(range(10, 100), k=draw.randint(6, 9))
    return f"sort {_list(numbers)}=", _list(sorted(numbers))


def look_ups(draw: random.Random) -> Problem:
    """Looks up one to three of six digits by their names, and adds them."""
    names = draw.sample(NAMES, 6)
    values = draw.choices(range(1, 10), k=6)
    pairs = [f"{name}{value}" for name, value in zip(names, values)]
    asked = draw.sample(range(6), draw.randint(1, 3))
    question = f"look up {' '.join(pairs)}; {'+'.join(names[i] for i in asked)}="
    return question, str(sum(values[i] for i in asked))


def brackets(draw: random.Random) -> Problem:
    """Closes what twenty to fifty brackets leave open, one to twelve of them."""
    while True:
        text = ""
        still_open: list[str] = []
        for _ in range(draw.randint(20, 50)):
            if still_open and draw.random() < 0.45:
                text += PAIRS[still_open.pop()]
            else:
                bracket = draw.choice("([{")
                text += bracket
                still_open.append(bracket)
        if 1 <= len(still_open) <= 12:
            answer = "".join(PAIRS[bracket] for bracket in reversed(still_open))
            return f"close {text}=", answer


def _list(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "sums": sums,
    "sorting": sorting,
    "look_ups": look_ups,
    "brackets": brackets,
}

# How the harness asks: it continues the question greedily, up to the full stop.
ASKED = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 32, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def different(kind: str) -> Iterator[Problem]:
    """Yields problems of a kind, none twice, the same in every run."""
    draw = random.Random(kind)
    seen: set[str] = set()
    while True:
        question, answer = KINDS[kind](draw)
        if question not in seen:
            seen.add(question)
            yield question, answer


def make_problems(out: str, train: int, test: int) -> None:
    """Writes problems of every kind to the folder `out`, whole or not at all.

    Args:
      out: the folder, which must not exist.
      train, test: problems of each kind. Those to test on come first: more to train on change
        nothing there.
    """
    progress = Progress("made", len(KINDS) * (train + test), "problems")
    done = 0
    with whole(Path(out)) as folder:
        for kind in KINDS:
            problems = different(kind)
            for split, count in (("test", test), ("train", train)):
                some = list(itertools.islice(problems, count))
                write_text(folder / "text" / split / f"{kind}.txt", some)
                if split == "test":
                    write_benchmark(folder, kind, some)
                done += count
                progress(done)


def write_text(path: Path, problems: list[Problem]) -> None:
    """Writes a document for each problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [f"{question}{answer}." for question, answer in problems]
    path.write_text("\n\f\n".join(documents) + "\n", encoding="utf-8")


def write_benchmark(folder: Path, kind: str, problems: list[Problem]) -> None:
    """Writes the task of a kind for the harness, and its problems."""
    import yaml

    file = f"{kind}.test.jsonl"
    settings = {
        "task": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
    }
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(settings | ASKED, sort_keys=False))
    rows = [{"question": question, "answer": answer} for question, answer in problems]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / file).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    commands.run(
        lambda flags: make_problems(flags.out, flags.train, flags.test),
        __doc__,
        out=(REQUIRED, "the folder to write"),
        train=(200_000, "problems of each kind to train on"),
        test=(1000, "problems of each kind to test on"),
    )
