"""One longer job, what it looks like undisturbed, and how to look into it while it runs."""

import re
import time

from tests.processes import Job

STEPS, EVERY = 60, 3  # steps, and steps between checkpoints
CHANGES = {"train.steps": STEPS, "train.checkpoint_every": EVERY, "train.keep": 2}


class Task:
    """The job, by one process with two devices or two with one."""

    def __init__(self, tiny, root):
        self.root, self.finished = root, {}
        (root / "config.py").write_text(
            "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
            f"    config.update_from_flattened_dict({tiny | CHANGES!r})\n    return config\n"
        )

    def command(self, workdir, *changes):
        return [
            "-m",
            "latent_delib.train",
            f"--config={self.root}/config.py",
            f"--workdir={workdir}",
            *changes,
        ]

    def start(self, count, workdir, *changes):
        said = self.root / f"{workdir.name}_{len(list(self.root.iterdir()))}"
        return Job(count, 2 // count, said, *self.command(workdir, "--start_timeout=20", *changes))

    def undisturbed(self, count):
        """The workdir of a job that ran to its end at once."""
        if count not in self.finished:
            self.finished[count] = workdir = self.root / f"undisturbed_{count}"
            with self.start(count, workdir) as job:
                assert job.wait() == [0] * count, job.said(0)
        return self.finished[count]


def newest(workdir):
    """The step of the newest checkpoint that is whole; 0 without one."""
    found = (workdir / "checkpoints").glob("*/_CHECKPOINT_METADATA")
    return max((int(p.parent.name) for p in found if p.parent.name.isdigit()), default=0)


def is_saving(workdir):
    return any(".orbax-checkpoint-tmp" in p.name for p in (workdir / "checkpoints").glob("*"))


def last_step(said):
    return max(
        map(int, re.findall(rf"^(?:\[0\] )?step (\d+)/{STEPS} ", said, re.MULTILINE)), default=0
    )


def wait_until(process, condition, *args):
    """Returns False where the process ends before the condition holds."""
    while not condition(*args):
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True
