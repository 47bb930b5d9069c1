"""Makes problems that a small decoder half solves: text to train on, and a benchmark of each kind.

  python -m tools.make_problems --out=runs/problems

  sums      sum 7 5 9 3 8 8 1 9 4=54.
  sorting   sort 73 91 50 46 82=46 50 73 82 91.
  look_ups  look up a7 b3 c9 d4; b+d=7.
  brackets  close {[](=)}.                  what is still open
  follow    follow 3 1 4 2; 2: 1 2=4 3.     two steps: 1 leads to 3, that to 4
  far       the same, of four to six steps

Writes for each kind text/train/KIND.txt and text/test/KIND.txt, documents of one problem each, and
KIND.yaml and KIND.test.jsonl, which the lm-eval harness reads; `follow` and `far` have a benchmark
for each number of steps, follow_1 to follow_6. configs/problems.py is their table for `benchmark`.
No problem is there twice. The same counts give the same files.
"""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from latent_delib.errors import UserError
from latent_delib.machine import arguments, commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import atomic_folder
from latent_delib.machine.progress import Progress
from tools import task_files

Problem = tuple[str, str]  # question, answer

NAMES = "abcdefghij"
PAIRS = {"(": ")", "[": "]", "{": "}"}
DRAWS = 10_000  # in vain, before a kind of problems counts as used up


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


def follow(draw: random.Random) -> Problem:
    """Follows a list of eight places from five of them, one to three steps."""
    return _follow(draw, 1, 3)


def far(draw: random.Random) -> Problem:
    """Follows such a list for four to six steps."""
    return _follow(draw, 4, 6)


def _follow(draw: random.Random, least: int, most: int) -> Problem:
    places = draw.choices(range(1, 9), k=8)
    asked = draw.choices(range(1, 9), k=5)
    steps = draw.randint(least, most)
    found = asked
    for _ in range(steps):
        found = [places[place - 1] for place in found]
    return f"follow {_list(places)}; {steps}: {_list(asked)}=", _list(found)


def _list(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


KINDS = {make.__name__: make for make in (sums, sorting, look_ups, brackets, follow, far)}

# How the harness asks: it continues the question greedily, up to the full stop.
ASKED = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 32, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def different(kind: str, make: Callable[[random.Random], tuple]) -> Iterator[tuple]:
    """Yields problems of a kind, their questions first, none twice, the same in every run.

    Raises:
      UserError: no new one was drawn for a long time: there are hardly more.
    """
    draw = random.Random(kind)
    seen: set[str] = set()
    in_vain = 0
    while in_vain < DRAWS:
        problem = make(draw)
        in_vain += 1
        if problem[0] not in seen:
            seen.add(problem[0])
            in_vain = 0
            yield problem
    raise UserError(
        f"{kind}: there are hardly more than {len(seen):,} different ones; ask for fewer"
    )


def drawn(
    kinds: Mapping[str, Callable[[random.Random], tuple]], train: int, test: int, unit: str
) -> Iterator[tuple[str, str, list[tuple]]]:
    """Yields (kind, split, problems), `train` and `test` of each kind; prints how many are made.

    Those to test on come first: more to train on change nothing there.

    Raises:
      UserError: a count is below 0, or there are not so many problems.
    """
    arguments.whole("--train", train, 0)
    arguments.whole("--test", test, 0)
    progress = Progress("made", len(kinds) * (train + test), unit)
    done = 0
    for kind, make in kinds.items():
        problems = different(kind, make)
        for split, count in (("test", test), ("train", train)):
            yield kind, split, list(itertools.islice(problems, count))
            done += count
            progress(done)


def make_problems(out: str, kinds: Sequence[str], train: int, test: int) -> None:
    """Writes problems of some kinds to the folder `out`, whole or not at all.

    Args:
      out: the folder, which must not exist.
      kinds: keys of KINDS.
      train, test: as in `drawn`.

    Raises:
      UserError: there is no such kind; or as `drawn`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds: {kind!r}: expected some of {', '.join(KINDS)}")
    makers = {kind: KINDS[kind] for kind in kinds}
    with atomic_folder(Path(out)) as folder:
        for kind, split, problems in drawn(makers, train, test, "problems"):
            documents = (f"{question}{answer}." for question, answer in problems)
            task_files.write_documents(folder / "text" / split / f"{kind}.txt", documents)
            if split == "test":
                write_benchmarks(folder, kind, problems)


def benchmark_of(kind: str, question: str) -> str:
    """Returns the name of the benchmark that asks a question."""
    steps = re.search(r"; (\d):", question)
    return f"follow_{steps[1]}" if steps else kind


def write_benchmarks(folder: Path, kind: str, problems: list[Problem]) -> None:
    """Writes the tasks of a kind for the harness, and their problems."""
    rows = defaultdict(list)
    for question, answer in problems:
        row = {"question": question, "answer": answer}
        rows[benchmark_of(kind, question)].append(row)
    for name, some in rows.items():
        task_files.write_task(folder, name, {"test": some}, ASKED)


if __name__ == "__main__":
    commands.run(
        lambda flags: make_problems(flags.out, flags.kinds.split(","), flags.train, flags.test),
        __doc__,
        out=(REQUIRED, "the folder to write"),
        kinds=("sums,sorting,look_ups,brackets", "the kinds to make"),
        train=(200_000, "problems of each kind to train on"),
        test=(1000, "problems of each kind to test on"),
    )
