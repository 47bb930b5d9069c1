"""tpu_vm.sh and worker.sh against a `gcloud` that plays a script."""

import re
import shlex
import shutil
import subprocess
import time

import pytest

from tests.launch.pretend import AT, CREATE, DELETE, QUOTED, SSH, STATE, TRAIN, World

BOTH_RUN = "-e $WORLD/started-0 && -e $WORLD/started-1 && ! -e $WORLD/deleted"


def test_create_asks_once_and_waits_until_the_node_is_ready(world: World) -> None:
    world.plays(states=["ABSENT", "ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = world.launch("tpu_vm", "create", "a", "--accelerator=v5litepod-16", "--spot")
    calls = [f"gcloud {call}" for call in world.calls()]
    assert (calls.count(CREATE), calls.count(STATE)) == (1, 5)
    assert "no capacity yet" in done.stderr

    # it is there: nothing to do
    world.launch("tpu_vm", "create", "a", "--accelerator=v5litepod-16")
    assert len(world.calls("create")) == 1


@pytest.mark.parametrize(
    "accelerator, version",
    [
        ("v4-16", "tpu-ubuntu2204-base"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5e-16", None),
    ],
)
def test_runtime_version_follows_the_generation(
    world: World, accelerator: str, version: str | None
) -> None:
    done = world.launch(
        "tpu_vm", "create", "a", f"--accelerator={accelerator}", "--dry_run", code=int(not version)
    )
    assert f"--runtime-version={version} --async" in done.stdout or "expected v4-N" in done.stderr
    assert "--spot" not in done.stdout


def test_a_runtime_version_may_be_given(world: World) -> None:
    create = ("tpu_vm", "create", "a", "--accelerator=tpu7x-16", "--dry_run")
    assert "gke_xpk.sh" in world.launch(*create, code=1).stderr
    done = world.launch(*create, "--runtime=another")
    assert "--accelerator-type=tpu7x-16 --runtime-version=another --async" in done.stdout


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--reserved", " compute tpus .* --reserved "),
        (
            "--flex_start=12h",
            " alpha compute tpus .* --provisioning-model=flex-start --max-run-duration=12h ",
        ),
    ],
)
def test_how_a_slice_is_paid(world: World, flag: str, given: str) -> None:
    create = ("tpu_vm", "create", "a", "--accelerator=v6e-16", "--dry_run", flag)
    (line,) = [line for line in world.launch(*create).stdout.splitlines() if "create" in line]
    assert re.search(given, line)
    assert (
        f"{flag.partition('=')[0]}: expected one" in world.launch(*create, "--spot", code=1).stderr
    )


def test_keep_sees_a_job_through_on_two_slices(world: World) -> None:
    world.plays(states=["ABSENT", "ACTIVE"])
    assert "the job on a is done" in world.keep("--slices=2", "--delete").stderr
    world.started(1)
    (create,) = world.calls("create")
    assert "--node-count=2 --node-prefix=a " in create and "--node-id" not in create
    assert len(world.calls("scp")) == 2 and len(world.calls("delete")) == 1
    world.plays(**{"ends-0": ["hang"], "ends-1": ["hang"]})
    for action in ("setup", "run"):
        world.launch("tpu_vm", action, "a", "--slices=2", *(["--", *TRAIN] * (action == "run")))
    status = world.launch("tpu_vm", "status", "a", "--slices=2").stdout
    assert status == "0.0 running\n1.1 running\n"
    world.launch("tpu_vm", "stop", "a", "--slices=2")
    assert "running" not in world.launch("tpu_vm", "status", "a", "--slices=2").stdout


def test_quota_is_not_tried_again_and_passing_failures_are(world: World) -> None:
    create = ("create", "a", "--accelerator=v5litepod-16")
    quota = "queued-resources create|RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded."
    world.plays(states=["ABSENT"], failures=[quota] * 3)
    done = world.launch("tpu_vm", *create, code=1)
    assert "TPUV5s" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: a is not granted; spot and on-demand")
    assert len(world.calls("create")) == 1

    rate = "queued-resources create|RESOURCE_EXHAUSTED: Quota exceeded: requests per minute"
    world.plays(states=["ABSENT", "ACTIVE"], failures=[rate, "queued-resources create|UNAVAILABLE"])
    world.launch("tpu_vm", *create)
    assert len(world.calls("create")) == 4

    world.plays(failures=["queued-resources describe|UNAVAILABLE: try later"] * 9)
    done = world.launch("tpu_vm", *create, code=1)
    assert "gave up at try 3: ERROR: (gcloud) UNAVAILABLE: try later" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: the state of a cannot be seen; is gcloud logged in (gcloud auth login), and"
    )
    world.plays(failures=["queued-resources describe|UNAVAILABLE: try later"] * 9)
    assert world.launch("tpu_vm", "status", "a", code=1).stderr.splitlines()[-1] == last


def test_what_exists_already(world: World) -> None:
    """It worked and its answer was lost; the name is another slice's; it came to nothing."""
    create = ("tpu_vm", "create", "a", "--accelerator=v5litepod-16")
    world.plays(states=["ABSENT", "ACTIVE"], failures=["queued-resources create|ALREADY_EXISTS: a"])
    world.launch(*create)

    done = world.launch("tpu_vm", "create", "a", "--accelerator=v6e-16", code=1)
    assert done.stderr.endswith("error: a exists already, as a v5litepod-16\n")

    world.plays(states=["FAILED"])
    assert "out of luck" in world.launch(*create, code=1).stderr
    assert len(world.calls("create")) == 1


def test_run_is_detached_on_every_worker(world: World) -> None:
    world.plays(**{"ends-0": ["hang"], "ends-1": ["hang"]})
    assert "set up?" in world.launch("tpu_vm", "run", "a", "--", *TRAIN, code=1).stderr
    world.plays(hook=["[[ $all != *tpu-vm* ]] || { echo NOT_FOUND >&2 && exit 1; }"])
    for action in ("setup", "stop"):
        (said,) = world.launch("tpu_vm", action, "a", code=1).stderr.splitlines()
        assert "is it there?" in said
    world.plays(hook=[])
    (world.root / "configs" / "x.py").touch()
    (world.root / "runs").mkdir(exist_ok=True)
    (world.root / "runs" / "mine").touch()
    assert world.launch("tpu_vm", "setup", "a").stdout == "0 ready, base tpu\n1 ready, base tpu\n"
    world.env["LATENT_DELIB_EXTRAS"] = "wandb"
    assert "0 ready, base tpu,wandb\n" in world.launch("tpu_vm", "setup", "a").stdout
    del world.env["LATENT_DELIB_EXTRAS"]
    for worker in (0, 1):
        home = world.world / f"worker-{worker}" / "latent_delib"
        assert (home / "configs" / "x.py").exists()
        assert not (home / "runs" / "mine").exists()
        (home / "configs" / "gone.py").touch()
    assert world.launch("tpu_vm", "status", "a").stdout == "0 none\n1 none\n"
    said = world.launch("tpu_vm", "logs", "a", code=1).stderr
    assert said == "error: no job has run here\n" * 2

    world.launch("tpu_vm", "run", "a", "--", *TRAIN)
    assert world.launch("tpu_vm", "status", "a").stdout == "0 running\n1 running\n"
    world.launch("tpu_vm", "run", "a", "--", *TRAIN)  # as after an answer that was lost
    assert (
        "another job runs here"
        in world.launch("tpu_vm", "run", "a", "--", "python", "-m", "y", code=1).stderr
    )

    assert "another job runs here" in world.launch("tpu_vm", "setup", "a", code=1).stderr

    world.launch("tpu_vm", "stop", "a")
    lines = world.launch("tpu_vm", "status", "a").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [["0", "exit", "75"], ["1", "exit", "75"]]
    world.started(1)
    logs = world.launch("tpu_vm", "logs", "a").stdout
    assert "[0] this start ends with hang\n" in logs and "[1] this start ends with hang\n" in logs

    world.launch("tpu_vm", "setup", "a")
    assert not (world.world / "worker-0" / "latent_delib" / "configs" / "gone.py").exists()


def test_a_start_that_reached_one_worker_is_completed(world: World) -> None:
    """Started on some workers only, a job hangs without a word."""
    world.launch("tpu_vm", "setup", "a")
    world.plays(
        **{"ends-0": ["hang"], "ends-1": ["hang"]},
        failures=["worker-1 .*worker.sh start|ssh: connection reset"],
    )
    world.launch("tpu_vm", "run", "a", "--", *TRAIN)
    world.started(1)


def test_keep_sees_a_job_through(world: World) -> None:
    world.plays(states=["ABSENT", "ACTIVE"])
    assert "the job on a is done" in world.keep("--spot", "--delete").stderr
    world.started(1)
    assert len(world.calls("create")) == len(world.calls("delete")) == 1


@pytest.mark.parametrize("how", ["queued resource", "node", "gone node"])
def test_keep_after_a_preemption(world: World, how: str) -> None:
    world.plays(**{"ends-0": ["hang", "0"], "ends-1": ["hang", "0"]})
    world.plays(states=["ABSENT", "ACTIVE", "SUSPENDED started", "ABSENT deleted", "ACTIVE"])
    if how != "queued resource":
        world.plays(states=["ABSENT", "ACTIVE", "ABSENT deleted", "ACTIVE"])
        says = "echo PREEMPTED && exit" if how == "node" else "echo NOT_FOUND >&2 && exit 1"
        lost = f'$all == *"tpu-vm describe"* && {BOTH_RUN}'
        world.plays(hook=[f"if [[ {lost} ]]; then {says}; fi"])
    done = world.keep("--restarts=0")
    assert "== a is lost: deleting it and asking for another" in done.stderr
    world.started(2)
    assert len(world.calls("create")) == 2
    assert len(world.calls("delete")) == 1


def test_keep_does_not_fight_who_deletes_the_slice(world: World) -> None:
    world.plays(**{"ends-0": ["hang"], "ends-1": ["hang"]})
    world.plays(states=["ABSENT", "ACTIVE", "ABSENT started"])
    assert world.keep(code=1).stderr.endswith("error: a is gone: somebody deleted it\n")
    assert len(world.calls("create")) == 1


def test_keep_stops_after_code_1(world: World) -> None:
    world.plays(**{"ends-0": ["hang"], "ends-1": ["1"]})
    done = world.keep("--delete", code=1)
    assert "failed with code 1" in done.stderr
    assert "this start ends with 1" in done.stdout  # the log
    world.started(1)
    order = [
        max(i for i, call in enumerate(world.calls()) if part in call)
        for part in ("start", "stop", "delete")
    ]
    assert order == sorted(order)


def test_keep_deletes_the_slice_of_a_failed_job_though_its_workers_go(world: World) -> None:
    world.plays(**{"ends-0": ["1"], "ends-1": ["1"]})
    going = f"$all =~ (job/log|worker.sh stop)$ && {BOTH_RUN}"
    world.plays(hook=[f"[[ ! ({going}) ]] || exit 255"])
    world.keep("--delete", code=1)
    assert (len(world.calls("job/log")), len(world.calls("delete"))) == (3, 1)


def test_keep_restarts_what_saved_and_what_died(world: World) -> None:
    """Code 75 always, a death `restarts` times; the cause is what ended first."""
    world.plays(**{"ends-0": ["75", "75", "137", "0"], "ends-1": ["hang", "75", "hang", "0"]})
    world.keep("--restarts=1")
    world.started(4)

    exits = [f"$WORLD/worker-{worker}/latent_delib/runs/job/exit" for worker in (0, 1)]
    status_after_both = (
        f"until [[ $all != *status* || -e {exits[0]} && -e {exits[1]} ]]; do sleep 0.02; done"
    )
    world.plays(**{"ends-0": ["134", "0"], "ends-1": ["later 1", "0"], "hook": [status_after_both]})
    world.keep()
    world.started(6)

    world.plays(**{"ends-0": ["hang"] * 2, "ends-1": ["134"] * 2, "hook": []})
    assert "the job on a died 2 times" in world.keep("--restarts=1", code=1).stderr


@pytest.mark.parametrize("end", ["hang", "0"])  # of the first worker, while the second goes on
def test_keep_finds_a_running_job_again(world: World, end: str) -> None:
    world.launch("tpu_vm", "setup", "a")
    world.plays(**{"ends-0": [end, "hang"], "ends-1": ["hang", "hang"]})
    world.launch("tpu_vm", "run", "a", "--", *TRAIN)
    if end == "hang":
        assert "error: a is busy" in world.keep(command=("python", "-m", "another"), code=1).stderr
    while end == "0" and "exit 0" not in world.launch("tpu_vm", "status", "a").stdout:
        pass

    command = [
        world.root / "launch" / "tpu_vm.sh",
        "keep",
        "a",
        "--accelerator=v5litepod-16",
        "--",
        *TRAIN,
    ]
    looks = len(world.calls("worker.sh\\ status"))
    with subprocess.Popen(
        command, env=world.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as keep:
        try:
            while len(world.calls("worker.sh\\ status")) < looks + 3 and keep.poll() is None:
                time.sleep(0.02)
        finally:
            keep.terminate()
    world.started(1)
    assert len(world.calls("scp")) == 1


@pytest.mark.parametrize(
    "says",
    [
        "exit 255",
        """echo 'This TPU has terminal state "PREEMPTED", so it cannot be used.' >&2 && exit 1""",
    ],
    ids=["nothing", "preempted"],
)
def test_keep_replaces_a_slice_that_does_not_answer(world: World, says: str) -> None:
    """ssh may notice a preemption before the queued resource and the node say so."""
    world.plays(**{"ends-0": ["hang", "0"], "ends-1": ["hang", "0"]})
    world.plays(states=["ABSENT", "ACTIVE", "ABSENT deleted", "ACTIVE"])
    silent = f'$all == *"worker.sh status"* && {BOTH_RUN}'
    world.plays(hook=[f"[[ ! ({silent}) ]] || {{ {says}; }}"])
    assert "does not answer: deleting it" in world.keep().stderr
    world.started(2)
    assert len(world.calls("create")) == 2


def test_keep_leaves_a_slice_that_it_may_not_ask(world: World) -> None:
    world.plays(**{"ends-0": ["hang"], "ends-1": ["hang"]})
    world.plays(states=["ABSENT", "ACTIVE"])
    lost_key = f'$all == *"worker.sh status"* && {BOTH_RUN}'
    says = "echo 'SSH Key is not present in the SSH agent' >&2 && exit 1"
    world.plays(hook=[f"if [[ {lost_key} ]]; then {says}; fi"])
    assert "A job on a goes on" in world.keep(code=1).stderr.splitlines()[-1]
    assert not world.calls("delete")
    world.plays(hook=[])
    assert world.launch("tpu_vm", "status", "a").stdout == "0 running\n1 running\n"


@pytest.mark.parametrize(
    "arguments, missing, message",
    [
        ("create a", "LATENT_DELIB_PROJECT", "LATENT_DELIB_PROJECT"),
        ("create a", "PATH", "gcloud is not on PATH"),
        ("create A_b", "ANY", "a name of a-z, 0-9 and -"),
        ("create a", "ANY", "--accelerator=: "),
        ("create a --slices=0", "ANY", "--slices=0: "),
        ("create a --spot=false", "ANY", "--spot=false: takes no value"),
        ("create a --restarts=ten", "ANY", "--restarts=ten: "),
        ("create a --flex_start", "ANY", "--flex_start=1: expected a time like 12h"),
        ("restart a", "ANY", "no action 'restart'"),
        ("restart", "LATENT_DELIB_PROJECT", "no action 'restart'"),
        ("run a --flag=1", "ANY", "--flag=1: "),
        ("run a", "ANY", "no command"),
        ("keep a -- python --workdir=runs/x", "ANY", "--workdir=runs/x: "),
    ],
)
def test_mistakes_are_one_line(world: World, arguments: str, missing: str, message: str) -> None:
    tools = world.world / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    world.env[missing] = str(tools) if missing == "PATH" else ""
    done = world.launch("tpu_vm", *arguments.split(), code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not world.calls()


def test_dry_run_prints_what_would_run(world: World) -> None:
    done = world.keep("--spot", "--dry_run")
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    copy, setup, start = map(shlex.split, lines[-3:])
    worker_sh = "latent_delib/launch/worker.sh"
    assert CREATE in lines
    code = "runs/launch/a/code.tar.gz"
    assert copy == f"gcloud compute tpus tpu-vm scp {code} a: {AT} --worker=all --quiet".split()
    assert setup[-1].endswith("LATENT_DELIB_EXTRAS=tpu ./launch/worker.sh setup")
    assert start == [*SSH, f"--command={worker_sh} start {QUOTED} --distributed"]
    rsync = "gcloud storage rsync --recursive"
    for source, fetched in (
        ("gs://bucket/d", f"mkdir -p runs/d && {rsync} gs://bucket/d runs/d && LATENT_DELIB_"),
        ("gs://b/x & y", rf"mkdir -p runs/x\ \&\ y && {rsync} gs://b/x\ \&\ y runs/x\ \&\ y &&"),
    ):
        setup = world.keep(f"--fetch={source}", "--dry_run").stdout.splitlines()[-2]
        assert fetched in shlex.split(setup)[-1]
    assert world.launch("tpu_vm", "delete", "a", "--dry_run").stdout == DELETE + "\n"
    logs = world.launch("tpu_vm", "logs", "a", "--worker=1", "--dry_run").stdout
    assert shlex.split(logs)[-3:] == ["--worker=1", "--quiet", f"--command={worker_sh} logs"]
    assert not world.calls()
    assert not (world.root / "runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs gcloud, though no cloud")
def test_gcloud_knows_every_flag(world: World) -> None:
    lines = world.launch("tpu_vm", "delete", "a", "--dry_run").stdout
    for flags in (["--spot"], ["--reserved", "--slices=2"], ["--flex_start=12h"]):
        lines += world.keep(*flags, "--dry_run").stdout
    used: dict[tuple[str, ...], set[str]] = {}
    for words in map(shlex.split, lines.splitlines()):
        if words[0] == "gcloud":
            used.setdefault(tuple(words[: 5 + (words[1] == "alpha")]), set()).update(
                w.split("=")[0] for w in words if w.startswith("--")
            )
    assert len(used) == 7
    for command, flags in used.items():
        text = subprocess.run(
            [*command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert [flag for flag in flags if flag not in text] == []
