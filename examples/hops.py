"""Shows latents in the place of written steps.

  .venv/bin/python -m examples.hops [--seed=N]

A frozen decoder follows a list of places by writing every step. Made to answer at once, it only
guesses; with the latents of a coprocessor it knows. Decoder and coprocessor lie in examples/hops;
docs/results_questions.md says how they were trained. The questions are made anew.
"""

import random
import time
from pathlib import Path
from typing import NamedTuple

import latent_delib as ld
from latent_delib.data import questions
from latent_delib.data.questions import STEPS_END, Question
from latent_delib.machine import commands
from tools.make_questions import hops

FOLDER = Path(__file__).parent / "hops"
COUNT = 100  # questions
LONGEST = 64  # tokens of a reply, at most
COLUMNS = "{:<38}{:>8}{:>14}{:>10}"


class Way(NamedTuple):
    """Holds a way to ask: the text that the reply begins with, and whether latents come first."""

    begin: str
    augment: bool


WAYS = {
    "the frozen decoder, in written steps": Way("", augment=False),
    "the same decoder, without the steps": Way(f" {STEPS_END}", augment=False),
    "the same decoder, with 16 latents": Way("", augment=True),
}


def ask(lm: ld.AugmentedLM, asked: list[Question], way: Way) -> tuple[list[str], float]:
    """Returns the replies to questions, and the seconds they took."""
    prompts = [question.prompt() + way.begin for question in asked]
    began = time.perf_counter()
    replies = lm.generate(prompts, LONGEST, stop=questions.STOP, augment=way.augment)
    return replies, time.perf_counter() - began


def main(seed: int = 0, count: int = COUNT) -> dict[str, float]:
    """Asks new questions in each way, and prints a table; returns the shares of right answers."""
    decoder = ld.load_decoder(FOLDER / "decoder")
    lm = ld.AugmentedLM(decoder, ld.load_coprocessor(FOLDER / "coprocessor"))
    draw = random.Random(f"examples {seed}")
    asked = [hops(draw) for _ in range(count)]

    print(f"\n{asked[0].prompt()} ...")
    for name, way in WAYS.items():
        (reply,), _ = ask(lm, asked[:1], way)
        print(f"  {name}:{reply}")

    print("\n" + COLUMNS.format(f"{count} new questions", "right", "tokens each", "seconds"))
    shares = {}
    for name, way in WAYS.items():
        ask(lm, asked, way)  # compiles
        replies, seconds = ask(lm, asked, way)
        right = [questions.answer_in(r) == q.answer for r, q in zip(replies, asked)]
        tokens = [len(decoder.tokenizer.encode(reply + questions.STOP)) for reply in replies]
        shares[name] = sum(right) / count
        print(
            COLUMNS.format(
                name, f"{shares[name]:.0%}", f"{sum(tokens) / count:.1f}", f"{seconds:.2f}"
            )
        )
    return shares


if __name__ == "__main__":
    commands.run(
        lambda flags: main(flags.seed),
        __doc__,
        seed=(0, "another seed asks other questions"),
    )
