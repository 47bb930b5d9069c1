"""Shows latents in the place of written steps.

  .venv/bin/python -m examples.hops [SEED]

A frozen decoder follows a list of places by writing every step. With the latents of a coprocessor
it answers at once. Both lie in examples/hops; docs/results.md says how they were trained. The
questions are made anew: another SEED asks others.
"""

import random
import sys
import time
from pathlib import Path

import latent_delib as ld
from latent_delib.data import questions
from latent_delib.data.questions import Question
from tools.make_questions import hops

FOLDER = Path(__file__).parent / "hops"
COUNT = 100  # questions
LONGEST = 64  # tokens of a reply, at most
COLUMNS = "{:<38}{:>8}{:>14}{:>10}"


def ask(lm: ld.AugmentedLM, asked: list[Question], augment: bool) -> tuple[list[str], float]:
    """Returns the replies to questions, with or without latents, and the seconds they took."""
    prompts = [question.prompt() for question in asked]
    began = time.perf_counter()
    replies = lm.generate(prompts, LONGEST, stop=questions.STOP, augment=augment)
    return replies, time.perf_counter() - began


def main(seed: int = 0, count: int = COUNT) -> dict[str, float]:
    """Asks new questions both ways, and prints a table; returns the share of right answers."""
    decoder = ld.load_decoder(FOLDER / "decoder")
    lm = ld.AugmentedLM(decoder, ld.load_coprocessor(FOLDER / "coprocessor"))
    draw = random.Random(f"examples {seed}")
    asked = [hops(draw) for _ in range(count)]
    ways = {"the frozen decoder, in written steps": False, "the same decoder with 16 latents": True}

    print(f"\n{asked[0].prompt()} ...")
    for way, augment in ways.items():
        (reply,), _ = ask(lm, asked[:1], augment)
        print(f"  {way}:{reply}")

    print("\n" + COLUMNS.format(f"{count} new questions", "right", "tokens each", "seconds"))
    shares = {}
    for way, augment in ways.items():
        ask(lm, asked, augment)  # compiles
        replies, seconds = ask(lm, asked, augment)
        right = [questions.answer_in(r) == q.answer for r, q in zip(replies, asked)]
        tokens = [len(decoder.tokenizer.encode(reply + questions.STOP)) for reply in replies]
        shares[way] = sum(right) / count
        print(
            COLUMNS.format(
                way, f"{shares[way]:.0%}", f"{sum(tokens) / count:.1f}", f"{seconds:.2f}"
            )
        )
    return shares


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
