"""What a run leaves on disk, and two runs compared."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np

from latent_delib.machine import checkpoint


def rows_of(workdir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def weights_of(workdir: Path, step: int | None = None) -> dict:
    """The trainable tree of a run's checkpoint, of its newest or of a step."""
    checkpoints, meta = checkpoint.open_for_reading(str(workdir), step)
    step = meta["step"]
    found = checkpoints.restore_newest(step=step)
    return jax.device_get(found.trainable)


def meta_of(workdir: Path) -> dict:
    """What a run's newest checkpoint says of itself."""
    _, meta = checkpoint.open_for_reading(str(workdir))
    return meta


def metrics(workdir):
    """What a run computed at every step, without its times."""
    return [
        {k: row[k] for k in ("step", "loss", "grad_norm", "learning_rate")}
        for row in rows_of(workdir)
    ]


def everything(workdir, step=None):
    """Step, and every leaf of trainable tree and optimizer of a checkpoint."""
    checkpoints, meta = checkpoint.open_for_reading(str(workdir), step)
    step = meta["step"]
    trees = checkpoints.restore_newest({"trainable": None, "optimizer": None}, step=step).trees
    return step, {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }


def assert_same(workdir, expected):
    """Metrics of every step, once each, and the newest checkpoint: bit for bit."""
    assert metrics(workdir) == metrics(expected)
    (step, found), (last, leaves) = everything(workdir), everything(expected)
    assert step == last and found.keys() == leaves.keys() and len(leaves) > 30
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name, strict=True)


def assert_close(workdir, expected, *figures):
    """Metrics and weights: float32 sums in another order, so the last places differ.

    figures: further keys of the metrics, which some steps have.
    """
    rows, known = rows_of(workdir), rows_of(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in known]
    for key in ("loss", "grad_norm", *figures):
        found, wanted = ([row.get(key, 0) for row in some] for some in (rows, known))
        np.testing.assert_allclose(found, wanted, rtol=2e-5, err_msg=key)
    step = meta_of(expected)["step"]
    one, other = (weights_of(where, step) for where in (workdir, expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), one, other)


def flip(path, part=0.5):
    """Flips a bit of a file, this part of it in."""
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 1
    path.write_bytes(bytes(data))


def copy_at_step_2(trained, workdir):
    """Copies a run of four steps as it was after two."""
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
