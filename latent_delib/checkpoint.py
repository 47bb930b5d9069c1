"""Orbax checkpoints of a training run: the trainable tree, the optimizer, and what is needed to go on exactly."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from latent_delib.errors import UserError


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints/STEP.

    Each holds three items: "trainable", "optimizer", and "meta", JSON with the resolved config, the decoder's
    fingerprint and the data position. Frozen parameters are never written. A save is asynchronous and appears under
    its name only once whole, so an interrupted one leaves the one before as the newest.
    """

    def __init__(self, workdir: str, keep: int = 2, read_only: bool = False):
        self.path = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only, cleanup_tmp_directories=not read_only
        )
        handlers = {
            "trainable": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, trainable: Any, optimizer: Any, meta: Mapping[str, Any]) -> None:
        """Starts a save; the one before it is finished first.

        Raises:
          OSError: the disk is full or not writable. What was saved before stays whole.
        """
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable),
            optimizer=ocp.args.StandardSave(optimizer),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with self._disk_errors():
            self._manager.save(step, args=args, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON item alone."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, trainable: Any, optimizer: Any = None) -> tuple[Any, Any]:
        """Trainable tree and optimizer state; without `optimizer` the trainable tree alone.

        Args:
          trainable, optimizer: trees of jax.ShapeDtypeStruct with the shardings wanted here, whatever wrote them.
        """
        args = {"trainable": ocp.args.StandardRestore(trainable)}
        if optimizer is not None:
            args["optimizer"] = ocp.args.StandardRestore(optimizer)
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return restored.trainable, restored.get("optimizer")

    def restore_anywhere(self, step: int) -> Any:
        """The trainable tree alone, on the first device of this process, without knowing its shapes beforehand."""
        device = SingleDeviceSharding(jax.local_devices()[0])
        found = self._manager.item_metadata(step)["trainable"].tree
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), found)
        return self.restore(step, wanted)[0]

    def wait(self) -> None:
        """Returns when every started save is whole on disk; raises as `save` does."""
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """tensorstore, which writes the arrays, tells of the system's errors in a ValueError's text."""
        try:
            yield
        except ValueError as error:
            if not (found := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(self.path)) from None


def open_for_reading(workdir: str, step: int | None = None) -> tuple[Checkpoints, int, dict[str, Any]]:
    """A finished or running job's checkpoints, the step asked for or the newest, and its meta.

    Raises:
      UserError: there is no checkpoint, or not that one.
    """
    root = epath.Path(workdir) / "checkpoints"
    if not root.is_dir():
        raise UserError(f"--workdir={workdir}: holds no checkpoints; train it first")
    checkpoints = Checkpoints(workdir, read_only=True)
    found = checkpoints.latest() if step is None else step
    if found is None or not (root / str(found)).is_dir():
        steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"--workdir={workdir}: {wanted}; there are {steps}")
    return checkpoints, found, checkpoints.meta(found)
