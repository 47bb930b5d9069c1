"""Jobs that are killed over and over end with the weights of one that never was.

    ./launch/test.sh -n 0 -s -m slow tests/faults

prints what it counted; docs/reliability.md has the figures, and what it takes.
"""

import random
import signal
import time

import pytest
import workdirs

from latent_delib.machine import distributed
from tests.faults.task import EVERY, is_saving, last_step, newest, wait_until

pytestmark = pytest.mark.slow

KILLS, STOPS = 20, 5


def reach(draw, job, workdir, kind):
    """Waits some steps, for a save or a moment after the start; False: the job ended first."""
    goal = newest(workdir) + draw.randrange(1, 8)
    if kind == "start":
        time.sleep(draw.uniform(0, 8))
    elif not wait_until(job.processes[0], lambda: last_step(job.said(0)) >= goal):
        return False
    elif kind == "save" and not wait_until(job.processes[0], is_saving, workdir):
        return False
    else:
        time.sleep(draw.uniform(0, 0.1))
    return job.processes[0].poll() is None


@pytest.mark.parametrize("count", [1, 2])
def test_random_moments(task, count):
    draw, seen = (
        random.Random(count),
        dict.fromkeys(("runs", "starts", "kills", "in a save", "starting", "stops"), 0),
    )
    faults = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * STOPS
    draw.shuffle(faults)
    repeated, slowest = 0, 0.0
    while faults:
        seen["runs"] += 1
        workdir, codes = task.root / f"killed_{count}_{seen['runs']}", None
        while codes != [0] * count:
            before, kind = newest(workdir), draw.choice(["steps", "steps", "save", "save", "start"])
            with task.start(count, workdir) as job:
                seen["starts"] += 1
                if faults and faults[-1] == signal.SIGTERM:
                    kind = "steps"  # until it trains, a job has nothing to save
                if not faults or not reach(draw, job, workdir, kind):
                    codes = job.wait()
                    assert codes == [0] * count, job.said(0)
                    continue
                fault, one, began = faults.pop(), draw.randrange(count), time.monotonic()
                saving = is_saving(workdir)
                job.processes[one].send_signal(fault)
                codes = job.wait()
                reached, saved = last_step(job.said(0)), newest(workdir)
                assert not (
                    before and reached
                ) or f"resuming {workdir} at step {before}" in job.said(0)
                assert saved >= before, "no checkpoint is lost"
                if fault == signal.SIGTERM:
                    seen["stops"] += 1
                    # 0: it came in the last step
                    assert codes in ([75] * count, [0] * count), job.said(0)
                    assert saved == reached, "what was done is saved"
                    continue
                seen["kills"] += 1
                seen["in a save"] += saving
                seen["starting"] += not reached
                if reached:  # before that, those who are there wait for --start_timeout
                    slowest = max(slowest, time.monotonic() - began)
                assert codes.pop(one) == -signal.SIGKILL
                # of one that waits for all to start: 1
                assert set(codes) <= {
                    distributed.LOST,
                    -signal.SIGABRT,
                    1 if not reached else distributed.LOST,
                }
                repeated = max(repeated, reached - saved)
                assert reached - saved <= 2 * EVERY, (
                    "steps since a whole checkpoint, and one more may be in the making"
                )
        workdirs.assert_same(workdir, task.undisturbed(count))
    print(
        f"\n{count} process(es): {seen}; at most {repeated} steps done again; "
        f"ended {slowest:.1f} s after a kill"
    )
    assert (seen["kills"], seen["stops"]) == (KILLS, STOPS) and seen["in a save"] >= 4
    assert slowest < distributed.GRACE + 5
