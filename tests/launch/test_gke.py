"""gke_xpk.sh against an `xpk` that plays a script."""

import shlex

import pytest

from tests.launch.pretend import QUOTED, TRAIN, XPK_AT, World


def test_xpk_commands(world: World) -> None:
    run = ("gke_xpk", "run", "a", "--accelerator=v5litepod-16", "--slices=2")
    done = world.launch(*run, "--image=gcr.io/p/i:1", "--dry_run", "--", *TRAIN)
    (create,) = map(shlex.split, done.stdout.splitlines())
    assert create == [
        *f"xpk workload create {XPK_AT} --workload=a".split(),
        *("--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=gcr.io/p/i:1"),
        f"--command=exec {QUOTED} --distributed",
        *(
            "--max-restarts=1000",
            "--restart-on-exit-codes=69,75",
            "--termination-grace-period-seconds=300",
        ),
    ]
    world.launch(*run, "--", *TRAIN)
    build, push, create = world.calls()
    image = push.removeprefix("push ")
    assert image.startswith("gcr.io/project/latent_delib:")
    assert build == f"build --platform=linux/amd64 --build-arg=EXTRAS=tpu --tag={image} ."
    assert f"--docker-image={image}" in create.split()

    slice_of = "--tpu-type=v6e-16 --num-slices=1 --on-demand"
    logs = "--all-containers --prefix --follow --tail=20 --max-log-requests=1000"
    for arguments, expected in {
        "create_cluster --accelerator=v6e-16": f"cluster create {XPK_AT} {slice_of}",
        "status": f"workload list {XPK_AT}",
        "logs a": f"logs --selector=xpk.google.com/workload=a {logs}",
        "delete a": f"workload delete {XPK_AT} --workload=a --force",
        "delete_cluster": f"cluster delete {XPK_AT}",
    }.items():
        world.launch("gke_xpk", *arguments.split())
        assert world.calls()[-1] == expected


@pytest.mark.parametrize(
    "before, waits, code",
    [("", ["124", "124", "1", "0"], 0), ("RUNNING", ["125"], 1), ("FINISHED", ["1", "1", "1"], 1)],
)
def test_xpk_keep(world: World, before: str, waits: list[str], code: int) -> None:
    """Waits a week at a time, over failures to ask, for a job that it starts unless it is there.

    It deletes the job that was there before, and its own once it has seen its end.
    """
    there = {"FINISHED": ["EVERYTHING", "FINISHED"], "RUNNING": ["EVERYTHING"], "": []}[before]
    for status in ("EVERYTHING", "FINISHED"):
        world.plays(
            **{f"listed-{status}": ["Jobset   Status", "ab   x", *["a   x"] * (status in there)]}
        )
    deleted = (
        '[[ $all != *delete* ]] || echo | tee "$WORLD/listed-EVERYTHING" >"$WORLD/listed-FINISHED"'
    )
    ended = """[[ $all != *wait-for* ]] || echo "a   x" >>"$WORLD/listed-FINISHED\""""
    world.plays(waits=waits, hook=[deleted, ended])
    keep = ("gke_xpk", "keep", "a", "--accelerator=v5litepod-16", "--delete")
    world.launch(*keep, "--", *TRAIN, code=code)
    assert len(world.calls("wait-for-job-completion")) == len(waits)
    assert len(world.calls("workload create")) == (before != "RUNNING")
    seen_to_end = waits[-1] in ("0", "125")
    assert len(world.calls("workload delete")) == (before == "FINISHED") + seen_to_end
    assert len(world.calls("push")) == (before != "RUNNING")  # of its image


def test_xpk_keep_does_not_take_another_job_for_its_own(world: World) -> None:
    """XPK finds a job by a part of its name: the end of a-2 would delete a, which runs."""
    world.plays(**{"listed-EVERYTHING": ["Jobset   Status", "a   x"]})
    world.plays(**{"listed-FINISHED": ["Jobset   Status", "a-2   x"]}, waits=["0", "125", "0"])
    third = '$all == *wait-for* && $(wc -l <"$WORLD/waits") == 1'
    world.plays(hook=[f'[[ ! ({third}) ]] || echo "a   x" >>"$WORLD/listed-FINISHED"'])
    world.launch("gke_xpk", "keep", "a", "--accelerator=v5litepod-16", "--delete", "--", *TRAIN)
    assert len(world.calls("wait-for-job-completion")) == 3
    assert len(world.calls("workload delete")) == 1
