"""Jobs that are started again, that hang, whose disk is full, that share their data."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import workdirs

from latent_delib.machine import distributed
from tests.faults.task import last_step, newest, wait_until
from tests.processes import ROOT

pytestmark = pytest.mark.slow


def test_the_launcher_goes_on_after_a_kill(task):
    workdir, said = task.root / "launched", task.root / "launched.txt"
    command = [
        "./launch/local.sh",
        "--processes=2",
        "--devices=1",
        "--",
        "python",
        *task.command(workdir),
    ]
    with open(said, "w") as out:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        for kills in (1, 2):
            goal = newest(workdir) + 5
            assert wait_until(
                launcher,
                lambda goal=goal: last_step(said.read_text().rpartition("STARTING")[2]) > goal,
            )
            os.kill(int((workdir / ".lock").read_text()), signal.SIGKILL)  # process 0
            assert wait_until(
                launcher, lambda kills=kills: said.read_text().count("STARTING AGAIN") == kills
            )
        assert launcher.wait(300) == 0, said.read_text()
    finally:
        launcher.terminate()
        launcher.wait()
    assert said.read_text().count("resuming") == 2
    workdirs.assert_same(workdir, task.undisturbed(2))


def test_a_process_that_hangs_is_noticed(task):
    """Its sockets live on: only jax's heartbeats miss it."""
    with task.start(2, workdir := task.root / "hanging", "--config.train.steps=100000") as job:
        job.wait_for(0, "step 20/")
        began = time.monotonic()
        job.processes[1].send_signal(signal.SIGSTOP)
        code = job.processes[0].wait(300)
        seconds = time.monotonic() - began
        print(f"\nended {seconds:.0f} s after the other hung, code {code}: {job.said(0)[-300:]}")
        assert code in (distributed.LOST, -signal.SIGABRT)
    assert newest(workdir) > 0


def test_a_disk_that_is_full(task):
    workdir = task.root / "full"
    workdir.mkdir()

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", str(workdir)], capture_output=True
        ).returncode

    keep = "--config.train.keep=100"
    if mount("-o", "size=4m"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with task.start(1, workdir, keep) as job:
            assert job.wait() == [1]
            assert "No space left on device" in job.said(0).splitlines()[-1], job.said(0)
            assert "Traceback" not in job.said(0)
        assert (saved := newest(workdir)) > 0
        mount("-o", "remount,size=64m")
        with task.start(1, workdir, keep) as job:
            assert job.wait() == [0], job.said(0)
            assert f"at step {saved}" in job.said(0)
        workdirs.assert_same(workdir, task.undisturbed(1))
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


def test_a_record_that_is_bad_for_one_process_ends_both(task, token_folder):
    """And where some may be skipped, the job ends well."""
    shutil.copytree(token_folder, folder := task.root / "tokens")
    (file,) = (p for p in (folder / "train" / "0" / "tokens" / "c").rglob("*") if p.is_file())
    workdirs.flip(file)
    data = f"--config.data.token_files={folder}"
    with task.start(2, task.root / "bad", data) as job:
        assert job.wait() == [1, 1], job.said(0)
        said = [job.said(i).splitlines()[-1] for i in range(2)]
        assert (
            sum("bad record number 1, config.data.max_bad_records is 0" in line for line in said)
            >= 1
        ), said
    with task.start(2, task.root / "skipped", data, "--config.data.max_bad_records=1000") as job:
        assert job.wait() == [0, 0], job.said(0)
        assert any("bad record number 1, skipped" in job.said(i) for i in range(2))
