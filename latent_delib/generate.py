"""Continues a prompt with the plain decoder and with latents.

  python -m latent_delib.generate --workdir=DIR --prompt=TEXT [--no_augment]

Reads the newest checkpoint of WORKDIR (or --step) and the decoder it was trained on.
"""

from pathlib import Path
from typing import Any

from latent_delib import checkpoint, commands, lm
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError


def main(flags: Any) -> None:
    if not flags.prompt:
        raise UserError("--prompt is empty")
    checkpoints, _, meta = checkpoint.open_for_reading(flags.workdir, flags.step)
    checkpoints.close()
    trained = METHODS[meta["method.name"]].latents is None  # the decoder itself: it writes no latents
    path = str(Path(flags.workdir) / "decoder") if trained else meta["config"]["decoder"]["path"]
    if not path:
        raise UserError(f"--workdir={flags.workdir}: trained on random weights, there is nothing to generate with")
    plain = trained or flags.no_augment
    model = lm.AugmentedLM(lm.load_decoder(path), None if plain else lm.load_coprocessor(flags.workdir, flags.step))
    for title, augment in (("decoder", False), ("augmented", True)):
        if augment and plain:
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
