"""Continues a prompt with the plain decoder and with latents.

  python -m latent_delib.generate --workdir=DIR --prompt=TEXT [--no_augment]

Reads the newest checkpoint of WORKDIR (or --step) and the decoder it was trained on.
"""

from typing import Any

from latent_delib import checkpoint, commands, lm
from latent_delib.errors import UserError


def main(flags: Any) -> None:
    if not flags.prompt:
        raise UserError("--prompt is empty")
    _, _, meta = checkpoint.open_for_reading(flags.workdir, flags.step)
    path = meta["config"]["decoder"]["path"]
    if not path:
        raise UserError(f"--workdir={flags.workdir}: trained on random weights, there is nothing to generate with")
    decoder = lm.load_decoder(path)
    coprocessor = None if flags.no_augment else lm.load_coprocessor(flags.workdir, flags.step)
    model = lm.AugmentedLM(decoder, coprocessor)
    for title, augment in (("decoder", False), ("augmented", True)):
        if augment and flags.no_augment:
            continue
        (text,) = model.generate(
            [flags.prompt], flags.max_new_tokens, flags.temperature, flags.top_p, augment, flags.delay, flags.seed
        )
        print(f"--- {title}\n{flags.prompt}{text}", flush=True)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        workdir=(commands.REQUIRED, "of a training job"),
        prompt=(commands.REQUIRED, "the text to continue"),
        no_augment=(False, "the plain decoder alone"),
        max_new_tokens=(64, "tokens to decode"),
        temperature=(0.0, "0: the likeliest token each time"),
        top_p=(1.0, "sample from the likeliest tokens that reach this probability together"),
        delay=(0, "tokens decoded before the latents join (asynchronous coprocessor)"),
        seed=(0, "of the sampling"),
        step=(None, "checkpoint step; the newest if left out"),
    )
