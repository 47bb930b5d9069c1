"""Orbax checkpoints of a training run: the trees that it changes, and what is needed to go on
exactly.

Every process of a job calls everything here, in the same order. What one of them finds damaged is
damaged for all. Where a disk fails for one, that one ends, and `distributed.job` ends the others.
"""

import errno
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from latent_delib.errors import UserError, reason, store_error
from latent_delib.machine import contents, files
from latent_delib.machine.distributed import from_all, from_first, warn
from latent_delib.machine.workdir import is_remote


class Restored(NamedTuple):
    """Holds a checkpoint that was read, with the trees that were asked for."""

    step: int
    meta: dict[str, Any]
    trees: dict[str, Any]

    @property
    def trainable(self) -> Any:
        return self.trees["trainable"]


class Checkpoints:
    """Saves and restores the checkpoints of one run, in WORKDIR/checkpoints/STEP.

    A checkpoint holds each tree that `save` is given, under its name; "meta", JSON that says what
    the run is; and "contents", JSON by which damage is found. To store one more tree, pass it to
    `save` and to `restore_newest`. A save is asynchronous. Its folder appears only once it is
    whole, so an interrupted save leaves the checkpoint before it as the newest.

    Args:
      workdir: a local folder, or gs://BUCKET/PATH.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints of its multiples stay, too; 0: none.
      keep_best: so many checkpoints of the lowest loss stay, too.
      read_only: makes, renames and removes nothing.

    Raises:
      UserError: there is a file in the place of the folder, it is not the same folder for all
        processes, or gs:// lacks its package.
      OSError: it cannot be written (Outage: the store does not answer).
    """

    def __init__(
        self,
        workdir: str,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        self.workdir = workdir
        self.path = _folder(workdir)
        self.handler = ocp.StandardCheckpointHandler()
        self.manager = None
        if not read_only:
            with _disk_errors(self.path):
                self._make_folder()
                self.manager = _make_manager(self.path, keep, keep_every, keep_best)

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        meta: Mapping[str, Any],
        loss: float | None = None,
    ) -> None:
        """Starts a save; the one before it is finished first.

        Args:
          step: its number, which names its folder.
          trees: name -> tree of jax.Array: "trainable", and all else that is needed to go on.
          meta: says what the run is; JSON must be able to hold it.
          loss: for `keep_best`, the same on every process; None or not finite: not among the best.

        Raises:
          OSError: the disk is full or not writable (Outage: the store does not answer); earlier
            checkpoints stay whole.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(dict(meta))
        items["contents"] = ocp.args.JsonSave(contents.describe(meta, trees))
        has_loss = loss is not None and math.isfinite(loss)
        metrics = {"loss": float(loss)} if has_loss else None
        with _disk_errors(self.path):
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when every started save is whole on disk; raises as `save` does."""
        if self.manager is not None:
            with _disk_errors(self.path):
                self.manager.wait_until_finished()
                self.manager.check_for_errors()

    def close(self) -> None:
        """Waits, and ends the background threads; raises as `save` does."""
        if self.manager is not None:
            with _disk_errors(self.path):
                self.manager.close()

    def restore_newest(
        self,
        wanted: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
    ) -> Restored | None:
        """Returns the newest checkpoint that can be read, bit for bit as it was saved, or `step`;
        None without one.

        Each newer, damaged checkpoint is reported in one line, and its folder renamed to
        DAMAGED-STEP-TIME, so that the run can save that step again. A reader renames nothing.

        Args:
          wanted: name -> tree of jax.ShapeDtypeStruct with the shardings wanted here, whatever mesh
            wrote it. A tree that is None is read as it was saved, as numpy arrays. Others are not
            read. Default: {"trainable": None}.
          step: the one checkpoint to read.
          check: gets the meta before any array is read; a UserError from it ends the search.

        Raises:
          UserError: none can be read, or not the one asked for; or a tree wanted is not the one
            that was saved.
          OSError: the disk fails or denies access (Outage: the store does not answer), which is no
            damage.
        """
        if wanted is None:
            wanted = {"trainable": None}
        self.wait()
        with _disk_errors(self.path):
            there = sorted(whole_steps(self.workdir))
        there = from_first(there)
        if not there:
            return None
        asked = [at for at in reversed(there) if step in (None, at)]
        if not asked:
            raise UserError(f"{self.workdir}: no checkpoint of step {step}; there are {there}")
        damaged: dict[int, str] = {}
        for at in asked:
            restored, damage = self._restore(at, wanted, check)
            if damage:
                damaged[at] = damage
                continue
            for bad, why in damaged.items():
                aside = f"; its folder is now {self._put_aside(bad)}" if self.manager else ""
                warn(
                    f"{self.workdir}: checkpoint {bad} is damaged ({why}), checkpoint {at} is used instead{aside}"
                )
            return restored
        # All keep their names, or the next try would start from scratch.
        each = ", ".join(f"checkpoint {bad} is damaged ({why})" for bad, why in damaged.items())
        others = [at for at in there if at not in damaged]
        remedy = f"name another step, one of {others}" if others else "there is no other"
        raise UserError(f"{self.workdir}: {each}; {remedy}")

    def _restore(
        self, step: int, wanted: Mapping[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> tuple[Restored | None, str]:
        """Reads one checkpoint and compares it with its sums; returns it, and the damage that any
        process has found.
        """
        restored = None
        damage = ""
        try:
            restored, saved = self._read(step, wanted, check)
        except Exception as error:
            damage = _damage(error, self.path)
        damage = max(from_all(damage))
        if damage:
            return None, damage
        changed = ", ".join(contents.changed_leaves(saved, restored.trees))
        if changed:
            damage = f"{changed[:400]} not as saved"
        return restored, max(from_all(damage))

    def _read(
        self, step: int, wanted: Mapping[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> tuple[Restored, dict[str, Any]]:
        """Reads one checkpoint, without waiting for other processes; returns it, and its
        contents.
        """
        folder = self.path / str(step)
        _require(folder / "_CHECKPOINT_METADATA")
        with _noted("meta"):
            meta = json.loads((folder / "meta" / "metadata").read_text())
        with _noted("contents"):
            saved = json.loads((folder / "contents" / "metadata").read_text())
            if not contents.is_whole(meta, saved):
                raise ValueError("meta or contents not as saved")
        check(meta)
        trees = {}
        for name, shapes in wanted.items():
            with _noted(name):
                trees[name] = self._read_tree(step, name, shapes, saved)
        return Restored(step, meta, trees), saved

    def _read_tree(self, step: int, name: str, shapes: Any, saved: Mapping[str, Any]) -> Any:
        """Reads one tree. Not through the manager: its `restore` ends in a barrier, where others
        would wait.
        """
        if name not in saved:
            raise UserError(
                f"--workdir={self.workdir}: checkpoint {step} has no {name}, which this config needs"
            )
        folder = self.path / str(step) / name
        _require(folder / "_METADATA")  # orbax needs it only where no shapes are given
        if shapes is None:
            shapes = jax.tree.map(_on_host, self.handler.metadata(folder).tree)
        here = contents.leaf_types(shapes)
        there = {leaf: kind for leaf, (kind, _) in saved[name].items()}
        for leaf in sorted(here.keys() | there.keys()):
            ours = here.get(leaf, "nothing")
            theirs = there.get(leaf, "nothing")
            if theirs != ours:
                raise UserError(
                    f"--workdir={self.workdir}: checkpoint {step} has {theirs} for {name} {leaf}, this config {ours}"
                )
        return self.handler.restore(folder, args=ocp.args.StandardRestore(shapes))

    def _put_aside(self, step: int) -> str:
        """Renames the folder of a step; returns its new name."""
        name = f"DAMAGED-{step}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
        if jax.process_index() == 0:
            with _disk_errors(self.path):
                (self.path / str(step)).rename(self.path / name)
        name = from_first(name)  # which comes after the renaming
        self.manager.reload()
        return name

    def _make_folder(self) -> None:
        """Makes the folder, and a file in it for a moment: it can be written, and all processes see
        the same one.

        On disks of their own each process would write its part of every checkpoint, and none would
        ever be whole.
        """
        name = f".started-{time.time_ns()}"
        is_first = jax.process_index() == 0
        if is_first:
            files.make_folder(self.path)
            (self.path / name).write_text("")
        name = from_first(name)  # which comes after the writing
        seen = from_all(str((self.path / name).exists()))
        if is_first:
            (self.path / name).unlink()
        if "False" in seen:
            raise UserError(
                f"--workdir={self.workdir}: process {seen.index('False')} sees another folder there than process 0; "
                "expected a shared one"
            )


def open_for_reading(
    workdir: str, step: int | None = None
) -> tuple[Checkpoints, int, dict[str, Any]]:
    """Returns a finished or running job's checkpoints, the step asked for or the newest, and its
    meta.

    Raises:
      UserError: there is no checkpoint, or not that one.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    found = checkpoints.restore_newest({}, step=step)
    if found is None:
        raise UserError(f"{workdir}: {_no_checkpoints(workdir)}")
    return checkpoints, found.step, found.meta


def whole_steps(workdir: str) -> set[int]:
    """Returns the steps whose save is done, damaged ones too; asks no other process.

    A local folder takes its name once it is whole; in a bucket one file comes last.
    """
    path = _folder(workdir)
    if not path.is_dir():
        return set()
    folders = [folder for folder in path.iterdir() if folder.name.isdigit()]
    if is_remote(workdir):
        folders = [folder for folder in folders if (folder / "commit_success.txt").exists()]
    return {int(folder.name) for folder in folders}


def _folder(workdir: str) -> epath.Path:
    """Returns the folder of a run's checkpoints.

    Raises:
      UserError: it is on gs://, and a package is missing that orbax would ask for at its first
        save.
    """
    if not is_remote(workdir):
        return epath.Path(os.path.abspath(workdir)) / "checkpoints"
    with suppress(ModuleNotFoundError):  # of a package above it
        if importlib.util.find_spec("google.cloud.storage"):
            return epath.Path(workdir) / "checkpoints"
    raise UserError(
        f"{workdir}: gs:// needs the package google-cloud-storage (LATENT_DELIB_EXTRAS=tpu ./launch/setup.sh)"
    )


def _no_checkpoints(workdir: str) -> str:
    """Returns why a folder holds no checkpoints, and the remedy."""
    inside = re.fullmatch(r"(.+)/checkpoints(?:/(\d+))?/*", workdir)
    if inside is None:
        return "holds no checkpoints; train it first"
    step = f", with step={inside[2]}" if inside[2] else ""
    return f"is inside the workdir {inside[1]}; name that{step}"


def _require(path: epath.Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no file {path.name}")


@contextmanager
def _noted(item: str) -> Iterator[None]:
    """Notes on an error which part of a checkpoint was being read."""
    try:
        yield
    except Exception as error:
        error.add_note(item)
        raise


def _on_host(leaf: Any) -> np.ndarray:
    """Asks for a numpy array; takes no memory itself."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _damage(error: Exception, path: epath.Path) -> str:
    """Returns one line on files that cannot be read for what they hold; raises what is no damage of
    a checkpoint.
    """
    if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):
        raise error
    failed = store_error(error, path)
    is_missing = isinstance(failed, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if failed is not None and not is_missing and failed.errno != errno.EIO:
        raise failed from None
    where = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    return where + reason(error).replace(f"{path}/", "")


@contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    """Raises OSError for what a disk's or store's client raises; errors of a device, or of a lost
    process, stay.
    """
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise store_error(error, path) or error from None


def _make_manager(
    path: epath.Path, keep: int, keep_every: int, keep_best: int
) -> ocp.CheckpointManager:
    """Returns a manager of the folder, which is there, that keeps the checkpoints named in
    `Checkpoints`.
    """
    policies: list[Any] = [LatestN(keep)]
    if keep_every:
        policies.append(EveryNSteps(keep_every))
    if keep_best:
        best = BestN(
            get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        )
        policies.append(best)
    asynchronous = ocp.options.AsyncOptions(
        # by the clock on the wall, which may jump; stores have time-outs of their own
        timeout_secs=10**7,
        barrier_sync_fn=_barrier,
        # Where a folder cannot be made, threads that wait for it would keep the process for 5
        # minutes.
        create_directories_asynchronously=False,
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        best_fn=_loss,  # without it no loss is written
        create=False,
        save_root_metadata=False,
        cleanup_tmp_directories=True,
        async_options=asynchronous,
    )
    return _Manager(path, options=options)


class _Manager(ocp.CheckpointManager):
    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns None for a damaged loss, where orbax would find no checkpoint at all."""
        try:
            return {"loss": float(super().metrics(step)["loss"])}
        except (KeyError, TypeError, ValueError):
            return None


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Does as orbax's own, but a process whose save has failed waits for nobody: 20 minutes would
    hide the error.
    """
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
