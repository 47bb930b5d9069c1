"""Finds the checkpoints of a run on disk, without Orbax, other processes or devices.

So a command can look for checkpoints before jax has set up its devices.
"""

import importlib
import importlib.util
import json
import os
import re
from contextlib import suppress
from typing import Any

from etils import epath

from latent_delib.errors import UserError, extra, store_errors
from latent_delib.machine import files
from latent_delib.machine.workdir import is_remote


def read_meta(workdir: str, step: int | None = None) -> dict[str, Any]:
    """Reads the meta of the newest checkpoint, or of `step`.

    An older meta is read if the newest is damaged. Damage to other files is not noticed.

    Raises:
      UserError: there is no checkpoint, or none of `step`.
      OSError: as `whole_steps`.
    """
    where = folder(workdir)
    steps = sorted(whole_steps(workdir))
    if not steps:
        why = why_no_checkpoint(workdir)
        raise UserError(f"--workdir={workdir}: {why}; for a decoder alone, give a --config")
    if step is not None and step not in steps:
        raise UserError(f"--workdir={workdir}: no checkpoint of step {step}; there are {steps}")
    for number in reversed(steps) if step is None else [step]:
        path = where / str(number) / "meta" / "metadata"
        damaged = suppress(FileNotFoundError, NotADirectoryError, ValueError)
        with damaged, store_errors(path):
            return json.loads(path.read_text())
    at = "" if step is None else f" of step {step}"
    raise UserError(
        f"--workdir={workdir}: no checkpoint{at} that says how it was trained; give a --config"
    )


def whole_steps(workdir: str) -> set[int]:
    """Returns the steps whose save is done, damaged ones too; asks no other process.

    A local folder gets its name once it is whole. In a bucket, commit_success.txt is written last.

    Raises:
      UserError: as `folder`.
      OSError: the disk or store fails (Outage: the store does not answer).
    """
    if not is_begun(workdir):
        return set()
    where = folder(workdir)
    with store_errors(where):
        folders = [each for each in where.iterdir() if each.name.isdigit()]
        if is_remote(workdir):
            folders = [each for each in folders if (each / "commit_success.txt").exists()]
    return {int(each.name) for each in folders}


def is_begun(workdir: str) -> bool:
    """Returns whether a run has a folder of checkpoints, perhaps an empty one.

    Raises:
      UserError, OSError: as `whole_steps`.
    """
    return files.is_folder(folder(workdir))


def folder(workdir: str) -> epath.Path:
    """Returns the folder of a run's checkpoints.

    Raises:
      UserError: the workdir is on gs://, and a package that orbax or epath needs is missing.
    """
    if not is_remote(workdir):
        return epath.Path(os.path.abspath(workdir)) / "checkpoints"
    with extra("tpu"):
        importlib.import_module("google.cloud.storage")  # for orbax
        if importlib.util.find_spec("tensorflow") is None:
            importlib.import_module("gcsfs")  # for epath
    return epath.Path(workdir) / "checkpoints"


def look_up_bucket(where: epath.Path) -> None:
    """Looks up the bucket of a folder on gs://.

    Orbax does so when it deletes a checkpoint or opens a run that has some, with a permission of
    its own (storage.buckets.get). A job without it would end at its first deletion.
    """
    storage = importlib.import_module("google.cloud.storage")
    storage.Client().get_bucket(str(where).removeprefix("gs://").partition("/")[0])


def why_no_checkpoint(workdir: str) -> str:
    """Returns why a folder holds no checkpoints, and the remedy."""
    inside = re.fullmatch(r"(.+)/checkpoints(?:/(\d+))?/*", workdir)
    if inside is not None:
        step = f", with step={inside[2]}" if inside[2] else ""
        return f"is inside the workdir {inside[1]}; name that{step}"
    if os.path.isfile(f"{workdir}/config.json"):
        return "is a decoder's folder, without checkpoints; name the workdir of a training job"
    return "holds no checkpoints; run train first"
