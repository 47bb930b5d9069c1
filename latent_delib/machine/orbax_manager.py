"""How orbax is set up: which checkpoints stay, and how they are written."""

import sys
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN


def make_manager(path: epath.Path, keep: int, keep_every: int, keep_best: int) -> ocp.CheckpointManager:
    """Returns a manager of the folder, which is there, that keeps the checkpoints named in `Checkpoints`."""
    policies: list[Any] = [LatestN(keep)]
    if keep_every:
        policies.append(EveryNSteps(keep_every))
    if keep_best:
        best = BestN(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
        policies.append(best)
    asynchronous = ocp.options.AsyncOptions(
        timeout_secs=10**7,  # by the clock on the wall, which may jump; stores have time-outs of their own
        barrier_sync_fn=_barrier,
        # Where a folder cannot be made, threads that wait for it would keep the process for 5 minutes.
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
    """Does as orbax's own, but a process whose save has failed waits for nobody: 20 minutes would hide the error."""
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
