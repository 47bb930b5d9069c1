"""The text that `train --text` names: puts it into the config, and makes token files of it."""

from typing import Any

from latent_delib.data.sources import source_of
from latent_delib.errors import UserError
from latent_delib.job.preparation import prepare, shared_text


def use_text(config: Any, text: str, held_out: str) -> None:
    """Names a command line's text as the data of a config.

    Args:
      config: the config of a training job; its `data` is changed.
      text, held_out: texts to train on and to evaluate on, in a form of `sources.source_of`.

    Raises:
      UserError: `text` or `held_out` is missing, the two have files in common, or the config names
        token files.
    """
    if not (text and held_out):
        raise UserError(f"--text={text}, --held_out={held_out}: expected both")
    shared = shared_text(source_of(text), source_of(held_out))
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


def make_tokens(config: Any, workdir: str) -> None:
    """Makes the token files WORKDIR/tokens of a config's data, and names them in the config.

    Raises:
      UserError: as `prepare`.
    """
    prepare(config, token_folder(workdir))
    config.data.token_files = token_folder(workdir)


def token_folder(workdir: str) -> str:
    """Returns the folder of the token files that `make_tokens` makes."""
    return f"{workdir.rstrip('/')}/tokens"
