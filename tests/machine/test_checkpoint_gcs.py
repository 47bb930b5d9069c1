"""Checkpoints on gs://, in a child process that talks to a small Cloud Storage on this machine."""

import contextlib
import io
import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from latent_delib.machine.checkpoint import Checkpoints, open_for_reading
from tests.fake_gcs import running
from tests.workdirs import flip


def job(workdir: str) -> None:
    """Saves, deletes what is not kept, finds damage, goes back, and saves again."""
    logging.disable(logging.CRITICAL)

    def tree(seed):
        return {"w": jax.random.normal(jax.random.key(seed), (64, 64))}

    def save(checkpoints, *steps):
        for step in steps:
            checkpoints.save(
                step,
                {"trainable": tree(step), "optimizer": {"mu": tree(-step)}},
                {"step": step},
                loss=step,
            )
        checkpoints.close()

    save(Checkpoints(workdir), 4, 6)
    checkpoints = Checkpoints(workdir, keep=1)
    folder = checkpoints.path / "6"
    file = max((p for p in (folder / "trainable").glob("*/d/*")), key=lambda p: p.stat().length)
    flip(file)
    data = file.read_bytes()
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0)
    )
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        found = checkpoints.restore_newest({"trainable": wanted, "optimizer": {"mu": wanted}})
    (said,) = [line for line in stderr.getvalue().splitlines() if line.startswith("warning: gs://")]
    assert (found.step, found.meta) == (4, {"step": 4})
    for words in ("checkpoint 6 is damaged (trainable: ", ", checkpoint 4 is used instead"):
        assert words in said
    aside = checkpoints.path / said.rpartition(" ")[2]
    assert "DAMAGED-6-" in str(aside) and (aside / file.relative_to(folder)).read_bytes() == data
    save(checkpoints, 6)  # again, and 4 goes
    checkpoints, meta = open_for_reading(workdir)
    step = meta["step"]
    assert step == 6 and {p.name for p in checkpoints.path.iterdir()} == {"6", aside.name}
    np.testing.assert_array_equal(
        checkpoints.restore_newest(step=step).trainable["w"], tree(6)["w"]
    )
    print("done")


@pytest.mark.slow
@pytest.mark.parametrize("client", ["tensorflow", "gcsfs"])
def test_a_job_on_gs(client, tmp_path):
    pytest.importorskip("google.cloud.storage")
    pytest.importorskip(client)

    with running(tmp_path) as server:
        environment = os.environ | server.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "tests.machine.test_checkpoint_gcs", client]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert done.stdout == "done\n", done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["certificate.pem", "key.pem"], (
        "nothing went to the disk"
    )


@pytest.mark.slow
def test_an_account_that_may_not_look_up_its_bucket_is_told_at_once(tmp_path):
    """Orbax looks it up to delete a checkpoint: a job would end hours after its start."""
    pytest.importorskip("google.cloud.storage")
    pytest.importorskip("gcsfs")
    opens = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from latent_delib.machine.checkpoint import Checkpoints\n"
        "Checkpoints('gs://bucket/run')"
    )
    with running(tmp_path) as server:
        server.write("bucket/tokens", b"1")
        server.may_look_up = False
        environment = os.environ | server.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", opens]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert "PermissionError: [Errno 13]" in done.stderr.splitlines()[-1]
    assert "storage.buckets.get" in done.stderr.splitlines()[-1]


if __name__ == "__main__":
    if sys.argv[1] != "tensorflow":
        sys.modules["tensorflow"] = None  # as where it is not installed
    job("gs://bucket/some/run")
