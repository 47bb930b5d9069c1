"""Makes problems that a small decoder half solves: text to train on, and a benchmark of each kind.

  python -m tools.make_problems --out=runs/problems

  sums      37+48+5=90.
  sorting   sort 73915=13579.
  links     links 37 14 79; 2 from 3=9.     two digits are a link; so many are followed
  brackets  close {[](=)}.                  what is still open

Writes for each kind text/train/KIND.txt and text/test/KIND.txt, documents of one problem each, and
KIND.yaml and KIND.test.jsonl, which the lm-eval harness reads; configs/problems.py is their table
for `benchmark`. No problem is there twice. The same counts give the same files.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import whole
from latent_delib.machine.progress import Progress

Problem = tuple[str, str]  # question, answer

PAIRS = {"(": ")", "[": "]", "{": "}"}


def sums(draw: random.Random) -> Problem:
    """Adds two numbers of three digits, or three of two."""
    if draw.random() < 0.5:
        numbers = draw.sample(range(100, 1000), 2)
    else:
        numbers = draw.sample(range(10, 100), 3)
    return "+".join(map(str, numbers)) + "=", str(sum(numbers))


def sorting(draw: random.Random) -> Problem:
    """Sorts five to eight digits."""
    digits = draw.choices("0123456789", k=draw.randint(5, 8))
    return f"sort {''.join(digits)}=", "".join(sorted(digits))


def links(draw: random.Random) -> Problem:
    """Follows one to three links around a ring of four to six digits."""
    ring = draw.sample("0123456789", draw.randint(4, 6))
    pairs = [ring[i - 1] + ring[i] for i in range(len(ring))]
    draw.shuffle(pairs)
    start = draw.randrange(len(ring))
    steps = draw.randint(1, 3)
    end = ring[(start + steps) % len(ring)]
    return f"links {' '.join(pairs)}; {steps} from {ring[start]}=", end


def brackets(draw: random.Random) -> Problem:
    """Closes what eight to sixteen brackets leave open, one to six of them."""
    while True:
        text = ""
        still_open: list[str] = []
        for _ in range(draw.randint(8, 16)):
            if still_open and draw.random() < 0.45:
                text += PAIRS[still_open.pop()]
            else:
                bracket = draw.choice("([{")
                text += bracket
                still_open.append(bracket)
        if 1 <= len(still_open) <= 6:
            answer = "".join(PAIRS[bracket] for bracket in reversed(still_open))
            return f"close {text}=", answer


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "sums": sums,
    "sorting": sorting,
    "links": links,
    "brackets": brackets,
}

# How the harness asks: it continues the question greedily, up to the full stop.
ASKED = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 16, "do_sample": False},
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
        train=(250_000, "problems of each kind to train on"),
        test=(1000, "problems of each kind to test on"),
    )
