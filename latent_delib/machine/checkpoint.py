"""Orbax checkpoints of a training run: the trainable tree, the optimizer, and what is needed to go on exactly.

Every process of a job calls everything here, in the same order; what one of them finds damaged is damaged for all.
"""

import contextlib
import errno
import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from latent_delib.errors import Outage, UserError, reason, store_error
from latent_delib.machine import files
from latent_delib.machine.distributed import from_all

T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint is not what was saved."""


class Restored(NamedTuple):
    """What was read of a checkpoint; `optimizer` is None where it was not asked for."""

    step: int
    meta: dict[str, Any]
    trainable: Any
    optimizer: Any


def warn(line: str) -> None:
    """Prints a line once for all processes."""
    if jax.process_index() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints/STEP; WORKDIR is a local folder or gs://BUCKET/PATH.

    Each holds the items "trainable", "optimizer", "meta", JSON with the resolved config, the decoder's fingerprint and
    the data position, and "contents", JSON by which damage is found. Frozen parameters are never written. A save is
    asynchronous and appears under its name only once whole, so an interrupted one leaves the one before as the newest.
    Kept are the newest `keep`, every step that `keep_every` divides, and the `keep_best` with the lowest loss.

    Raises:
      UserError: the folder cannot be written, is not the same one for all processes, or gs:// lacks a package.
      Outage: the store does not answer.
    """

    def __init__(self, workdir: str, keep: int = 2, keep_every: int = 0, keep_best: int = 0, read_only: bool = False):
        _check_packages(workdir)
        self.workdir, self.read_only = workdir, read_only
        self.path = epath.Path(workdir if workdir.startswith("gs://") else os.path.abspath(workdir)) / "checkpoints"
        if not read_only:
            self._make_folder()
        policies: list[Any] = [LatestN(keep)]
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        if keep_best:
            best = BestN(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=_loss,  # without it no loss is written
            create=False,
            save_interval_steps=0 if read_only else 1,
            save_root_metadata=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # Folders at once: where one cannot be made, threads that wait for it would keep the process for 5 minutes.
            # Time-outs are by the clock on the wall, which may jump; stores have time-outs of their own.
            async_options=ocp.options.AsyncOptions(
                timeout_secs=10**7, barrier_sync_fn=_barrier, create_directories_asynchronously=False
            ),
        )
        self._trees, self._json = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        handlers = {"trainable": self._trees, "optimizer": self._trees, "meta": self._json, "contents": self._json}
        with self._disk_errors():
            self._manager = _Manager(self.path, options=options, item_handlers=handlers)

    def save(
        self, step: int, trainable: Any, optimizer: Any, meta: Mapping[str, Any], loss: float | None = None
    ) -> None:
        """Starts a save; the one before it is finished first.

        Args:
          trainable, optimizer: trees of jax.Array.
          loss: what `keep_best` goes by, the same on every process; None or not finite: not among the best.

        Raises:
          OSError: the disk is full or not writable (Outage: the store does not answer); what was saved stays whole.
        """
        contents = _contents(meta, {"trainable": trainable, "optimizer": optimizer})
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable),
            optimizer=ocp.args.StandardSave(optimizer),
            meta=ocp.args.JsonSave(dict(meta)),
            contents=ocp.args.JsonSave(contents),
        )
        metrics = {"loss": float(loss)} if loss is not None and math.isfinite(loss) else None
        with self._disk_errors():
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when every started save is whole on disk; raises as `save` does."""
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, and ends the background threads; raises as `save` does."""
        with self._disk_errors():
            self._manager.close()

    def restore_newest(
        self,
        trainable: Any = None,
        optimizer: Any = None,
        *,
        step: int | None = None,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
    ) -> Restored | None:
        """Returns the newest checkpoint that can be read, bit for bit as it was saved, or `step`; None without one.

        Each newer one, being damaged, is told of in one line, and its folder renamed to DAMAGED-STEP-TIME, so that the
        run can save that step again; a reader renames nothing.

        Args:
          trainable, optimizer: trees of jax.ShapeDtypeStruct with the shardings wanted here, whatever wrote them.
            Without `trainable`: that tree as it was saved, as numpy arrays. Without `optimizer`: none.
          check: gets the meta before any array is read; a UserError from it ends the search.

        Raises:
          UserError: none can be read, or not the one asked for; or a tree wanted is not the one that was saved.
          OSError: the disk fails or denies access (Outage: the store does not answer), which is no damage.
        """
        return self._newest(lambda at: self._restore(at, trainable, optimizer, check), step)

    def newest_meta(self, step: int | None = None) -> tuple[int, dict] | None:
        """Returns step and meta alone, otherwise as `restore_newest`."""
        return self._newest(lambda at: self._together(lambda: (at, self._read_json(at)[0])), step)

    def _newest(self, read: Callable[[int], T], step: int | None) -> T | None:
        """Returns what `read` gives for the newest step that is not damaged, or for `step`."""
        self.wait()
        with self._disk_errors():
            self._manager.reload()
        damaged: dict[int, str] = {}
        while True:
            left = [s for s in self._manager.all_steps() if s not in damaged and step in (None, s)]
            at = int(from_all(str(max(left, default=-1)))[0])
            if at < 0:
                break
            try:
                found = read(at)
            except Damaged as error:
                damaged[at] = str(error)
                continue
            for bad, why in damaged.items():
                aside = "" if self.read_only else f"; its folder is now {self._put_aside(bad)}"
                warn(f"{self.workdir}: checkpoint {bad} is damaged ({why}), checkpoint {at} is used instead{aside}")
            return found
        if damaged:  # all keep their names, or the next try would start from scratch
            each = ", ".join(f"checkpoint {bad} is damaged ({why})" for bad, why in damaged.items())
            others = [s for s in self._manager.all_steps() if s not in damaged]
            remedy = f"; name another step, one of {others}" if others else ", and there is no other"
            raise UserError(f"{self.workdir}: {each}{remedy}")
        if step is not None:
            there = self._manager.all_steps()
            raise UserError(f"{self.workdir}: no checkpoint of step {step}; there are {there}")
        return None

    def _restore(self, step: int, trainable: Any, optimizer: Any, check: Callable[[dict], None]) -> Restored:
        """Reads one checkpoint. Not through the manager: its `restore` ends in a barrier, where others would wait."""

        def read() -> tuple[Restored, dict[str, Any]]:
            meta, contents = self._read_json(step)
            check(meta)
            found = {"trainable": trainable, "optimizer": optimizer}
            for item in ("trainable",) if optimizer is None else ("trainable", "optimizer"):
                with self._folder(step, item) as folder:
                    if not (folder / "_METADATA").exists():
                        raise FileNotFoundError("no file _METADATA")
                    wanted = self._as_saved(folder) if found[item] is None else found[item]
                    self._check_types(step, item, contents[item], wanted)
                    found[item] = self._trees.restore(folder, args=ocp.args.StandardRestore(wanted))
            return Restored(step, meta, **found), contents

        restored, contents = self._together(read)
        sums = _sums({"trainable": restored.trainable, "optimizer": restored.optimizer})
        changed = [
            f"{i}: {name}" for i, leaves in sums.items() for name in leaves if leaves[name] != contents[i][name][1]
        ]
        if names := max(from_all(", ".join(changed))):
            raise Damaged(f"{names[:400]} not as saved")
        return restored

    def _read_json(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns meta and contents."""
        if not (self.path / str(step) / "_CHECKPOINT_METADATA").exists():
            raise FileNotFoundError("no file _CHECKPOINT_METADATA")
        found = []
        for item in ("meta", "contents"):
            with self._folder(step, item) as folder:
                found.append(self._json.restore(folder))
        meta, contents = found
        if contents.pop("crc32") != _crc32(meta, contents):
            raise ValueError("meta or contents not as saved")
        return meta, contents

    @contextlib.contextmanager
    def _folder(self, step: int, item: str) -> Iterator[epath.Path]:
        """Gives the folder of an item; what fails inside is told with the item's name."""
        folder = self.path / str(step) / item
        try:
            if not folder.is_dir():
                raise FileNotFoundError("no such folder")
            yield folder
        except Exception as error:
            error.add_note(item)
            raise

    def _as_saved(self, folder: epath.Path) -> Any:
        """Asks for numpy arrays: where they go is for others to say."""
        found = self._trees.metadata(folder).tree
        return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), found)

    def _check_types(self, step: int, item: str, saved: dict[str, Any], wanted: Any) -> None:
        ours = {name: _type(x) for name, x in _named(wanted).items()}
        for name in sorted(ours.keys() | saved.keys()):
            theirs, here = saved[name][0] if name in saved else "nothing", ours.get(name, "nothing")
            if theirs != here:
                raise UserError(
                    f"--workdir={self.workdir}: checkpoint {step} has {theirs} for {item} {name}, this config {here}"
                )

    def _put_aside(self, step: int) -> str:
        """Renames the folder of a step; returns its new name."""
        name = from_all(f"DAMAGED-{step}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")[0]
        self._together(lambda: jax.process_index() or (self.path / str(step)).rename(self.path / name))
        self._manager.reload()
        return name

    def _make_folder(self) -> None:
        """Makes the folder, and sees that it can be written and is the same one for all processes.

        On disks of their own each would write its part of every checkpoint, and none would ever be whole.
        """
        first, marker = jax.process_index() == 0, self.path / from_all(f".started-{time.time_ns()}")[0]

        def make() -> None:
            try:
                files.make_folder(self.path)
                marker.write_text("")
            except Exception as error:
                if self._kind(error) == "outage":
                    raise
                raise UserError(f"--workdir={self.workdir}: cannot be written ({reason(error)})") from None

        def see() -> None:
            if not marker.exists():
                raise UserError(f"--workdir={self.workdir}: not the folder that process 0 has; expected a shared one")

        self._together(make if first else lambda: None)
        self._together(see)
        if first:
            marker.unlink()

    def _together(self, work: Callable[[], T]) -> T:
        """Runs `work`, in which no process waits for another; where it fails on one, it fails on all."""
        result, problem = None, ""
        try:
            result = work()
        except Exception as error:
            where = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            problem = f"{self._kind(error)} {where}{reason(error).replace(f'{self.path}/', '')}"
        if worst := max(from_all(problem)):
            kind, text = worst.split(" ", 1)
            if kind in ("failed", "outage"):
                raise (Outage if kind == "outage" else OSError)(errno.EIO, text, str(self.path))
            raise Damaged(text) if kind == "damaged" else UserError(text)
        return result

    def _kind(self, error: Exception) -> str:
        """Returns what a failed read tells of, "damaged" files the last of all: only the others stop the search."""
        if isinstance(error, UserError):
            return "refused"
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            return "failed"
        failed = store_error(error, self.path)
        if isinstance(failed, Outage):
            return "outage"
        missing = isinstance(failed, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return "damaged" if failed is None or missing or failed.errno == errno.EIO else "failed"

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of a device, or of a process that is gone
            raise
        except Exception as error:
            raise store_error(error, self.path) or error from None


# Orbax warns of each folder that it is asked to open for reading alone.
logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith("Given directory is read only"))


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
    """Does as orbax's own, but a process whose save has failed waits for nobody: 20 minutes would hide the error."""
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _no_checkpoints(workdir: str) -> str:
    """Returns why a folder holds no checkpoints, and the remedy."""
    inside = re.fullmatch(r"(.+)/checkpoints(?:/(\d+))?/*", workdir)
    if inside is None:
        return "holds no checkpoints; train it first"
    step = f", with step={inside[2]}" if inside[2] else ""
    return f"is inside the workdir {inside[1]}; name that{step}"


def open_for_reading(workdir: str, step: int | None = None) -> tuple[Checkpoints, int, dict[str, Any]]:
    """Returns a finished or running job's checkpoints, the step asked for or the newest, and its meta.

    Raises:
      UserError: there is no checkpoint, or not that one.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    with checkpoints._disk_errors():
        there = checkpoints.path.is_dir()
    if not there:
        raise UserError(f"{workdir}: {_no_checkpoints(workdir)}")
    if (found := checkpoints.newest_meta(step)) is None:
        raise UserError(f"{workdir}: no checkpoint; there are []")
    return checkpoints, *found


def whole_steps(workdir: str) -> set[int]:
    """Returns the steps of whole checkpoints; asks no other process.

    A local folder takes its name once it is whole; in a bucket one file comes last.
    """
    checkpoints = epath.Path(workdir) / "checkpoints"
    last = "commit_success.txt" if workdir.startswith("gs://") else "_CHECKPOINT_METADATA"
    folders = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return {int(f.name) for f in folders if f.name.isdigit() and (f / last).exists()}


def _contents(meta: Mapping[str, Any], trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint is compared with: types and sums of leaves, a checksum of these and the meta."""
    sums = _sums(trees)
    leaves = {
        item: {name: [_type(x), sums[item][name]] for name, x in _named(tree).items()} for item, tree in trees.items()
    }
    return leaves | {"crc32": _crc32(meta, leaves)}


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _type(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _crc32(*trees: Any) -> int:
    return zlib.crc32(json.dumps(trees).encode())


def _sums(trees: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns each leaf's sum of bits, read as integers, modulo 2**32: any flipped bit changes it, no mesh does."""
    return {item: _sums_of_leaves(_named(tree)) for item, tree in trees.items()}


def _sums_of_leaves(leaves: dict[str, Any]) -> dict[str, int]:
    if any(isinstance(x, jax.Array) for x in leaves.values()):
        return jax.tree.map(int, jax.device_get(_sum_bits(leaves)))
    words = {name: np.ascontiguousarray(x).view(f"u{min(x.dtype.itemsize, 4)}") for name, x in leaves.items()}
    return {name: int(x.sum(dtype=np.uint32)) for name, x in words.items()}


@jax.jit
def _sum_bits(tree: Any) -> Any:
    def one(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
        return jnp.sum(bits, dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _check_packages(workdir: str) -> None:
    """Names what orbax and epath would miss at their first use of gs://."""
    if not workdir.startswith("gs://"):
        return
    with contextlib.suppress(ModuleNotFoundError):  # raised for a parent, as google.cloud
        file_systems = [importlib.util.find_spec(name) for name in ("tensorflow", "gcsfs")]
        if importlib.util.find_spec("google.cloud.storage") and any(file_systems):
            return
    raise UserError(f"{workdir}: gs:// needs the packages google-cloud-storage, and tensorflow or gcsfs")
