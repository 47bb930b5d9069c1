"""Makes token files of the text that `train --text` names."""

from typing import Any

from latent_delib.data.sources import source_of, texts_of
from latent_delib.errors import UserError
from latent_delib.job.checks import check, check_steps
from latent_delib.job.preparation import prepare


def use_text(config: Any, text: str, held_out: str, workdir: str) -> None:
    """Turns a command line's text into WORKDIR/tokens, and names these files in the config.

    Args:
      config: the config of a training job; its `data` is changed.
      text, held_out: texts to train on and to evaluate on, in a form of `sources.source_of`.

    Raises:
      UserError: `text` or `held_out` is missing, or the config names token files; errors of
        `prepare`.
    """
    if not (text and held_out):
        raise UserError(f"--text={text}, --held_out={held_out}: expected both")
    shared = texts_of(source_of(text)) & texts_of(source_of(held_out))
    if shared:
        raise UserError(
            f"--held_out={held_out}: {min(shared)} is in --text too, which is trained on; "
            "name other text"
        )
    data = config.data
    if data.token_files:
        raise UserError(
            f"--text={text}, config.data.token_files={data.token_files}: expected one of the two"
        )
    data.sources = (source_of(text),)
    data.weights = (1.0,)
    data.validation = (source_of(held_out),)
    check(config)
    check_steps(config)
    tokens = f"{workdir.rstrip('/')}/tokens"
    prepare(config, tokens)
    data.token_files = tokens
