"""Writes the metrics of a training job to Weights & Biases."""

import secrets
from collections.abc import Mapping
from typing import Any

from etils import epath

from latent_delib.errors import UserError, extra, store_errors
from latent_delib.machine import files
from latent_delib.machine.workdir import is_remote


def package() -> Any:
    """Returns the package wandb. Raises UserError if it is not installed."""
    with extra("wandb"):
        import wandb
    return wandb


class WandbRun:
    """Writes rows to the one W&B run of a workdir, which continues when the training resumes.

    The run's id is in WORKDIR/wandb_run.txt. Its local files are in WORKDIR/wandb, or in ./wandb if
    the workdir is on gs://. With WANDB_MODE=offline only the local files are written.

    Args:
      project: the W&B project.
      workdir: the job's workdir, which names the run.
      config: every key of the job's config, as plain data.

    Raises:
      UserError: the package is missing, W&B refuses the run, or W&B does not answer.
    """

    def __init__(self, project: str, workdir: str, config: Mapping[str, Any]):
        wandb = package()
        try:
            self.run = wandb.init(
                project=project,
                id=_id_of_run(epath.Path(workdir) / "wandb_run.txt"),
                name=workdir,
                resume="allow",
                config=dict(config),
                allow_val_change=True,  # a job may resume with more steps
                dir=None if is_remote(workdir) else workdir,
            )
        except wandb.Error as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"config.train.wandb={project}: {why}; WANDB_MODE=offline needs no network"
            ) from None

    def write(self, row: Mapping[str, float]) -> None:
        """Writes a row of metrics, unless the run already has this step from before a resume."""
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        if step >= self.run.starting_step:
            self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """Ends the run, as finished or as failed."""
        self.run.finish(exit_code=int(failed))


def _id_of_run(file: epath.Path) -> str:
    """Returns the id of a workdir's run; draws and stores one where there is none."""
    with store_errors(file):
        if file.exists():
            return file.read_text().strip()
    drawn = secrets.token_hex(4)
    files.write(file, drawn.encode())
    return drawn
