"""Prints how many hops an answer to a question of `hops` proves, and what stored runs solve.

  .venv/bin/python -m tools.make_questions --out=runs/questions
  .venv/bin/python docs/figures/walks.py

A question has three walks over a short list, and its answer the places where they end. Walks
revisit places, so a model that follows fewer hops is often right.
"""

import json
from pathlib import Path

import numpy as np

from latent_delib.results import packed

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "runs/questions/hops.test.jsonl"
RESULTS = ROOT / "docs/results/hops"
RUNS = ("double", "overlay", "after", "from_scratch")
# Hops that are asked for -> hops that a model follows instead; the best counts for each question.
MODELS = {
    "two hops instead of four, three instead of five": {4: (2,), 5: (3,)},
    "three hops instead of five": {5: (3,)},
    "the best of two, three and four hops": {3: (2, 3), 4: (2, 3, 4), 5: (2, 3, 4)},
}


def ends_of(question: str) -> np.ndarray:
    """Returns the ends of each walk after 1, 2, ... hops, int [hops, walks]."""
    words = question.replace("?", "").replace(",", "").split()
    leads_to = np.array(words[1:9], int)  # place 1 leads to the first, and so on
    at = np.array(words[10:13], int)
    ends = []
    for _ in range(int(words[13])):
        at = leads_to[at - 1]
        ends.append(at)
    return np.array(ends)


def main() -> None:
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    every = [ends_of(question["question"]) for question in questions]
    asked = np.array(list(map(len, every)))
    print("| a model that follows | of all | of four hops | of five hops |")
    print("|---|---|---|---|")
    for name, instead in MODELS.items():
        solved = []
        for ends in every:
            followed = instead.get(len(ends), (len(ends),))
            solved.append(any((ends[k - 1] == ends[-1]).all() for k in followed))
        solved = np.array(solved)
        shares = [solved.mean(), solved[asked == 4].mean(), solved[asked == 5].mean()]
        print(f"| {name} |", " | ".join(f"{100 * share:.1f} %" for share in shares), "|")
    # Some walk ends elsewhere after two, three and four hops than after all five.
    needs_five = []
    for ends in every:
        elsewhere = (ends[1:4] != ends[-1]).all(axis=0)  # of each walk
        needs_five.append(len(ends) == 5 and bool(elsewhere.any()))
    needs_five = np.array(needs_five)
    print(f"\n{needs_five.sum()} questions need five hops for one of their walks. At least solved:")
    read = {file.path: file.read for file in packed.files_below(RESULTS)}
    for run in RUNS:
        found = []
        for seed in range(3):
            sums = read[RESULTS / f"{run}@{seed}" / packed.DOCUMENTS]()
            # A token with p > 0.5 is the likeliest one.
            sure = ((sums["augmented"] < np.log(2)) | (sums["tokens"] == 0)).all(axis=1)
            found.append(str(int(sure[needs_five].sum())))
        print(f"`{run}`: {', '.join(found)} (three seeds)")


if __name__ == "__main__":
    main()
