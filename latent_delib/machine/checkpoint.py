"""Saves and restores the checkpoints of a training run, with Orbax.

Every process of a job makes the same calls to this module, in the same order. A checkpoint that one
process finds damaged is damaged for all. If a disk fails for one process, that process ends, and
`distributed.job` ends the others.
"""

import errno
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from latent_delib.errors import UserError, reason, store_error
from latent_delib.machine import contents, files, saved_steps
from latent_delib.machine.distributed import from_all, from_first, on_first, warn
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

    A checkpoint holds each tree that `save` is given, under its name. It also holds "meta", JSON
    that describes the run, and "contents", JSON with the types and checksums that reveal damage. To
    store one more tree, pass it to `save` and to `restore_newest`. A save is asynchronous. Its
    folder appears only once it is whole. So after an interrupted save the checkpoint before it is
    still the newest.

    Args:
      workdir: a local folder, or gs://BUCKET/PATH.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints whose step it divides stay too; 0: none.
      keep_best: how many checkpoints of the lowest loss stay too.
      read_only: makes, renames and removes nothing.

    Raises:
      UserError: there is a file in place of the folder, its path has a bracket or a backslash,
        processes see different folders, or a package for gs:// is missing.
      OSError: the folder cannot be written (Outage: the store does not answer).
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
        self.path = saved_steps.folder(workdir)
        self.handler = ocp.StandardCheckpointHandler()
        self.manager = None
        if not read_only:
            check_path(workdir)
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
        """Starts a save, after the save before it is finished.

        Args:
          step: the step's number, which names the folder.
          trees: name -> tree of jax.Array: "trainable", and all else that is needed to resume.
          meta: a description of the run; JSON must be able to hold it.
          loss: for `keep_best`, the same on every process. With None, or a number that is not
            finite, the checkpoint is not among the best.

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Closes. After an error a started save becomes whole too, and the error is raised."""
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            with suppress(Exception):  # the disk may be the cause of the error
                self.close()

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
        """Returns the newest checkpoint that can be read, or that of `step`; None if there is none.

        Each newer, damaged checkpoint is reported in one line. Its folder is renamed to
        DAMAGED-STEP-TIME, so that the run can save that step again. With `read_only` nothing is
        renamed.

        Args:
          wanted: name -> tree of jax.ShapeDtypeStruct, with the shardings that this job wants: they
            need not be those of the save. A tree that is None is read as numpy arrays. Other
            trees are not read. Every bit is as it was saved. Default: {"trainable": None}.
          step: the step of the only checkpoint to read; None: the newest.
          check: a function that gets the meta before any array is read; a UserError from it ends
            the search.

        Raises:
          UserError: no checkpoint can be read, or not that of `step`; or a tree differs from
            `wanted`.
          OSError: the disk fails or denies access (Outage: the store does not answer).
        """
        if wanted is None:
            wanted = {"trainable": None}
        self.wait()
        there = on_first(lambda: sorted(saved_steps.whole_steps(self.workdir)))
        if not there:
            return None
        if step not in (None, *there):
            raise UserError(f"{self.workdir}: no checkpoint of step {step}; there are {there}")
        damaged: dict[int, str] = {}  # step -> reason
        for at in reversed(there) if step is None else [step]:
            restored, damage = self._restore(at, wanted, check)
            if not damage:
                self._put_aside(damaged, used=at)
                return restored
            damaged[at] = damage
        # No folder is renamed: otherwise the next try would find no checkpoint, and start anew.
        each = ", ".join(f"checkpoint {bad} is damaged ({why})" for bad, why in damaged.items())
        others = [at for at in there if at not in damaged]
        remedy = f"name another step, one of {others}" if others else "there is no other"
        raise UserError(f"{self.workdir}: {each}; {remedy}")

    def _restore(
        self, step: int, wanted: Mapping[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> tuple[Restored | None, str]:
        """Reads one checkpoint and checks its sums; returns it, and damage that any process found.

        The checkpoint is None if it cannot be read.
        """
        damage = ""
        try:
            restored, saved = self._read(step, wanted, check)
        except Exception as error:
            damage = _damage(error, self.path)
        damage = _of_any_process(damage)
        if damage:
            return None, damage
        changed = ", ".join(contents.changed_leaves(saved, restored.trees))
        if changed:
            damage = f"{changed[:400]} differs from what was saved"
        return restored, _of_any_process(damage)

    def _read(
        self, step: int, wanted: Mapping[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> tuple[Restored, dict[str, Any]]:
        """Reads one checkpoint without waiting for other processes; returns it and its contents."""
        folder = self.path / str(step)
        _require(folder / "_CHECKPOINT_METADATA")
        with _noted("meta"):
            meta = json.loads((folder / "meta" / "metadata").read_text())
        with _noted("contents"):
            saved = json.loads((folder / "contents" / "metadata").read_text())
            if not contents.is_whole(meta, saved):
                raise ValueError("meta or contents differ from what was saved")
        check(meta)
        trees = {}
        for name, shapes in wanted.items():
            with _noted(name):
                trees[name] = self._read_tree(step, name, shapes, saved)
        return Restored(step, meta, trees), saved

    def _read_tree(self, step: int, name: str, shapes: Any, saved: Mapping[str, Any]) -> Any:
        """Reads one tree, without the manager: its `restore` waits for all other processes."""
        where = f"--workdir={self.workdir}: checkpoint {step}"
        if name not in saved:
            raise UserError(f"{where} has no {name}, which this config needs")
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
                raise UserError(f"{where}: {name} {leaf} is {theirs}, expected {ours}")
        return self.handler.restore(folder, args=ocp.args.StandardRestore(shapes))

    def _put_aside(self, damaged: Mapping[int, str], used: int) -> None:
        """Warns of damaged checkpoints, step -> reason, and renames their folders if it may."""
        now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        for step, why in damaged.items():
            instead = f"checkpoint {used} is used instead"
            if self.manager:
                name = f"DAMAGED-{step}-{now}"
                instead += f"; its folder is now {name}"
                if jax.process_index() == 0:
                    with _disk_errors(self.path):
                        (self.path / str(step)).rename(self.path / name)
            warn(f"{self.workdir}: checkpoint {step} is damaged ({why}), {instead}")
        if self.manager and damaged:
            from_first(None)  # waits until all folders are renamed
            self.manager.reload()

    def _make_folder(self) -> None:
        """Makes the folder, and checks that it can be written and that all processes share it.

        If each process had a folder of its own, each folder would hold only a part of a checkpoint.
        """
        name = f".started-{time.time_ns()}"
        is_first = jax.process_index() == 0
        if is_first:
            files.make_folder(self.path)
            (self.path / name).write_text("")
            if is_remote(self.workdir):
                saved_steps.look_up_bucket(self.path)
        name = from_first(name)  # returns after process 0 has written the file
        seen = from_all(str((self.path / name).exists()))
        if is_first:
            (self.path / name).unlink()
        if "False" in seen:
            raise UserError(
                f"--workdir={self.workdir}: process {seen.index('False')} does not see the folder "
                "of process 0; expected a folder that all processes share"
            )


def open_for_reading(workdir: str, step: int | None = None) -> tuple[Checkpoints, dict]:
    """Returns the checkpoints of a job, and the meta of `step` or of the newest.

    Raises:
      UserError: there is no checkpoint, or none of `step`.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    found = checkpoints.restore_newest({}, step=step)
    if found is None:
        raise UserError(f"{workdir}: {saved_steps.why_no_checkpoint(workdir)}")
    return checkpoints, found.meta


def _require(path: epath.Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no file {path.name}")


@contextmanager
def _noted(item: str) -> Iterator[None]:
    """Adds the name of the part that is being read to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(item)
        raise


def _on_host(leaf: Any) -> np.ndarray:
    """Returns a placeholder with the shape and dtype of a leaf; it takes no memory.

    Given a numpy array, orbax reads into numpy, and onto no device.
    """
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _of_any_process(damage: str) -> str:
    """Returns the damage that this process or another has found; "" if none has found any."""
    return max(from_all(damage))


def _damage(error: Exception, path: epath.Path) -> str:
    """Returns one line on files that are damaged or missing; raises any other error."""
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
    """Raises errors of a disk or store as OSError; errors of a device or process stay the same."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        raise store_error(error, path) or error from None


class _Manager(ocp.CheckpointManager):
    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns None for a damaged loss, with which orbax itself would find no checkpoint."""
        try:
            return {"loss": float(super().metrics(step)["loss"])}
        except (KeyError, TypeError, ValueError):
            return None


def check_path(workdir: str) -> None:
    """Raises UserError for a path that Orbax would take for a pattern: it would lose all arrays."""
    path = saved_steps.folder(workdir)
    found = next((sign for sign in "[]\\" if sign in str(path)), None)
    if found is not None:
        raise UserError(f"{path}: a checkpoint's path cannot hold {found}; name another workdir")


def _make_manager(path: epath.Path, keep: int, keep_every: int, keep_best: int) -> _Manager:
    """Returns a manager of an existing folder; see `Checkpoints` for the numbers."""
    policies: list[Any] = [LatestN(keep)]
    if keep_every:
        policies.append(EveryNSteps(keep_every))
    if keep_best:
        best = BestN(
            get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        )
        policies.append(best)
    asynchronous = ocp.options.AsyncOptions(
        timeout_secs=10**7,  # in wall-clock time, which may jump; stores have their own time-outs
        barrier_sync_fn=_barrier,
        # Otherwise a folder that cannot be made holds the process for 5 minutes.
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


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Waits as orbax does, but not after a failed save: its error would come 20 minutes later."""
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
