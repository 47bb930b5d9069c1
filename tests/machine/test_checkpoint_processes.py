"""Checkpoints of two processes: what one of them finds damaged, both leave aside."""

import contextlib
import io
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.machine.checkpoint import Checkpoints
from tests.processes import Job
from tests.workdirs import flip


def trees(seed, mesh):
    """The trees of a checkpoint: jax.Array, and what to ask for to read them back."""
    w = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
    split, whole = (
        NamedSharding(mesh, PartitionSpec("a", "b")),
        NamedSharding(mesh, PartitionSpec()),
    )

    def array(x, place):
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    optimizer = {"mu": {"w": array(w + 1, split)}, "count": array(np.array(seed), whole)}
    both = {"trainable": {"w": array(w, split)}, "optimizer": optimizer}
    return both, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), both
    )


def assert_restored(found, step, seed, mesh):
    """Every part that this process holds."""
    assert (found.step, found.meta) == (step, {"seed": seed})
    for x, y in zip(
        jax.tree.leaves(found.trees), jax.tree.leaves(trees(seed, mesh)[0]), strict=True
    ):
        assert x.sharding == y.sharding
        for one, other in zip(x.addressable_shards, y.addressable_shards):
            np.testing.assert_array_equal(one.data, other.data, strict=True)


def process(workdir: str) -> None:
    """One of the two."""
    index = int(os.environ["JAX_PROCESS_ID"])
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, index)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("a", "b"))
    checkpoints = Checkpoints(workdir, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(step, trees(step, mesh)[0], {"seed": step})
    checkpoints.wait()
    if index == 0:
        parts = Path(workdir).glob("checkpoints/4/trainable/ocdbt.process_1/d/*")
        file = max(parts, key=lambda p: p.stat().st_size)
        flip(file)
    else:
        read = checkpoints.handler.restore

        def cannot(folder, args):
            if folder.parent.name == "6":
                raise ValueError("planted")
            return read(folder, args=args)

        checkpoints.handler.restore = cannot
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert_restored(checkpoints.restore_newest(trees(0, mesh)[1]), 2, 2, mesh)
    lines = said.getvalue().splitlines()
    assert len(lines) == (2 if index == 0 else 0), "process 0 alone tells of it"
    if lines:
        planted, flipped = (line.partition("(")[2].partition(")")[0] for line in lines)
        assert planted == "process 1: optimizer: planted"
        assert "trainable: " in flipped, "the sum tells of it, or the compression that it breaks"
    for step in (4, 6):  # again
        checkpoints.save(step, trees(10 * step, mesh)[0], {"seed": 10 * step})
    checkpoints.wait()

    # A full disk: who cannot write hears of it at once; the other waits for it, in the background,
    # until killed.
    tree, _ = trees(8, mesh)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if index == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    began = time.monotonic()
    checkpoints.save(8, tree, {})
    if index == 0:
        print("done", flush=True)
        time.sleep(300)
    with pytest.raises(OSError, match="File too large"):
        checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    print(f"done, {time.monotonic() - began:.0f} s", flush=True)
    os._exit(0)


def test_two_processes(tmp_path):
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    with Job(
        2, 2, tmp_path / "output", "-m", "tests.machine.test_checkpoint_processes", str(workdir)
    ) as job:
        for i in range(2):
            job.wait_for(i, "done", 120)
        assert int(job.said(1).rpartition("done, ")[2].split()[0]) < 60

    names = sorted(
        path.name.rpartition("-")[0] or path.name for path in (workdir / "checkpoints").iterdir()
    )
    assert names == ["2", "4", "6", "8.orbax-checkpoint", "DAMAGED-4", "DAMAGED-6"]
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 8), ("a", "b"))
    checkpoints = Checkpoints(str(workdir), read_only=True)
    for step, seed in ((None, 60), (4, 40), (2, 2)):
        assert_restored(
            checkpoints.restore_newest(trees(0, mesh)[1], step=step), step or 6, seed, mesh
        )


if __name__ == "__main__":
    process(sys.argv[1])
