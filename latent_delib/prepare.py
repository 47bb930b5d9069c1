"""Turns the texts of a config into token files.

  python -m latent_delib.prepare --config=configs/X.py --out=DIR [--config.key=value ...]

Training and evaluation then read DIR, named in `config.data.token_files`.
"""

from typing import Any

from latent_delib.data.rows import check_data
from latent_delib.job.preparation import prepare
from latent_delib.machine import commands
from latent_delib.machine.command_line import CONFIG, REQUIRED


def main(values: Any) -> None:
    """Checks `config.data` as a training job would; writes its token files."""
    check_data(values.config.data)
    prepare(values.config, values.out)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(CONFIG, "a config file, or the name of one in configs/"),
        out=(REQUIRED, "directory or gs:// path to write, or to finish"),
    )
