"""Jobs of several processes: the same as one; who is missing is named; none outlives another."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import workdirs

import latent_delib as ld
from latent_delib import evaluate, train
from latent_delib import mesh as mesh_lib
from latent_delib.errors import UserError
from latent_delib.machine import distributed, roll_call
from tests.processes import ROOT, Job, free_port

# The commands' work, several times in the same processes: starting them takes longer.
CHILD = """
import json, sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from configs import base
from latent_delib import evaluate, train
from latent_delib.errors import UserError
from latent_delib.job import experiment, parameters
from latent_delib.machine import distributed
from tests.shared_steps import shared_steps

def differ(config, kind, *folders):
    config.seed = jax.process_index()
    try:
        tasks[kind](config, *folders)
    except UserError as error:
        return str(error)

def export(config, workdir):
    exp = experiment.read(config)
    decoder = parameters.place_decoder(exp, jnp.float32)
    train.export_decoder(exp, workdir, 4, {"decoder": decoder}, None)

tasks = {"train": train.train, "evaluate": evaluate.evaluate, "export": export, "differ": differ}
with distributed.job(SimpleNamespace(distributed=True, start_timeout=300)):
    for kind, changes, *folders in eval(sys.argv[1]):
        config = base.get_config()
        config.update_from_flattened_dict(changes)
        with shared_steps():
            result = tasks[kind](config, *folders)
        print("RESULT", json.dumps(result), flush=True)
"""


def run(count, devices, folder, *tasks):
    """What each task, (kind, changes, *folders), gave: the same on every process."""
    with Job(count, devices, folder, "-c", CHILD, repr(tasks)) as job:
        assert job.wait() == [0] * count, job.said(0) + job.said(1)
        said = [job.said(i) for i in range(count)]
    for i in range(count):
        where = f"{devices} of {count * devices} devices, coordinator 127.0.0.1:"
        assert f"process {i} of {count}: {where}" in said[i]
        assert ("step 1/4" in said[i]) == (i == 0), "process 0 alone tells of it"
    results = [[line for line in text.splitlines() if line.startswith("RESULT")] for text in said]
    assert all(lines == results[0] for lines in results)
    return [json.loads(line.removeprefix("RESULT ")) for line in results[0]]


def test_two_processes_equal_one(tiny, trained, make_config, decoder_folder, tmp_path):
    """Trains, evaluates, goes on from one process's checkpoint, writes a decoder held in parts."""
    other = "process 1 has another config than process 0: "
    other += "expected the same command and files on every worker"
    workdirs.copy_at_step_2(trained, tmp_path / "resumed")
    decoder = tiny | {"method.name": "decoder", "mesh.data": 1, "mesh.fsdp": 8}
    stopped, result, *_, train_said, evaluate_said = run(
        2,
        4,
        tmp_path / "said",
        ("train", tiny, str(tmp_path / "fresh")),
        ("evaluate", tiny, str(tmp_path / "fresh"), str(tmp_path / "out")),
        ("train", tiny, str(tmp_path / "resumed")),
        ("export", decoder, str(tmp_path / "exported")),
        ("differ", tiny, "train", str(tmp_path / "differ")),
        ("differ", tiny, "evaluate", str(tmp_path / "fresh"), str(tmp_path / "differ")),
    )
    assert stopped == 0 and train_said == evaluate_said == other
    workdirs.assert_close(tmp_path / "fresh", trained)
    workdirs.assert_close(tmp_path / "resumed", trained)
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == result
    assert_same_perplexity(
        result, evaluate.evaluate(make_config(), str(tmp_path / "fresh"), str(tmp_path / "alone"))
    )

    exported = ld.load_decoder(tmp_path / "exported" / "decoder")
    original = ld.load_decoder(decoder_folder)
    jax.tree.map(np.testing.assert_array_equal, exported.params, original.params)


@pytest.mark.slow
def test_four_processes_on_every_mesh_axis_equal_one(tiny, trained, make_config, tmp_path):
    """Weights, heads and traces are split across processes; a row lies on four of them."""
    validated = {"train.validate_every": 2}
    split = tiny | validated | {"mesh.data": 1, "mesh.fsdp": 2, "mesh.traces": 2, "mesh.tensor": 2}
    _, result = run(
        4,
        2,
        tmp_path / "said",
        ("train", split, str(tmp_path / "fresh")),
        ("evaluate", split, str(trained), str(tmp_path / "out")),
    )
    workdirs.assert_close(tmp_path / "fresh", trained)
    workdirs.copy_at_step_2(trained, tmp_path / "one")
    train.train(make_config(validated), str(tmp_path / "one"))
    several, one = (workdirs.rows_of(tmp_path / name)[-1] for name in ("fresh", "one"))
    for name in ("validation_loss", "validation_loss_decoder"):
        assert several[name] == pytest.approx(one[name], rel=1e-5)
    assert_same_perplexity(
        result, evaluate.evaluate(make_config(), str(trained), str(tmp_path / "alone"))
    )


def assert_same_perplexity(result, expected):
    assert len(result["rows"]) == len(expected["rows"]) == 4
    for row, known in zip(result["rows"], expected["rows"]):
        assert (row["n"], row["tokens"]) == (known["n"], known["tokens"])
        for key in ("decoder_ppl", "augmented_ppl"):
            assert row[key] == pytest.approx(known[key], rel=1e-6)


@pytest.mark.slow
def test_sigterm_to_one_saves_on_both_and_a_kill_ends_both(config_file, tmp_path):
    config = config_file({"train.steps": 100_000, "train.checkpoint_every": 100_000})
    command = [
        "-m",
        "latent_delib.train",
        f"--config={config}",
        f"--workdir={tmp_path / 'workdir'}",
    ]
    with Job(2, 1, tmp_path / "first", *command) as job:
        job.wait_for(0, "step 3/")
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.wait() == [75, 75], job.said(0) + job.said(1)
        (last,) = job.said(0).splitlines()[-1:]
        assert "error" not in job.said(1)
    (saved,) = [p.name for p in (tmp_path / "workdir" / "checkpoints").iterdir()]
    assert last.startswith("stopped by ") and f"step {saved} is saved" in last and int(saved) >= 3

    with Job(2, 1, tmp_path / "second", *command) as job:
        job.wait_for(0, f"step {int(saved) + 2}/")
        assert f"resuming {tmp_path / 'workdir'} at step {saved}" in job.said(0)
        began = time.monotonic()
        job.processes[1].kill()
        assert job.wait() == [distributed.LOST, -9], job.said(0)
        assert time.monotonic() - began < distributed.GRACE + 30
        errors = [line for line in job.said(0).splitlines() if line.startswith("error")]
        assert errors == [
            "error: process 1 is gone: crashed, killed, or cut off; run again to resume"
        ]
        assert "Traceback" not in job.said(0)


# A process for each case, process 1 of 3, whose work ends with an error: the exit codes of all.
ENDS = """
import os, socket, sys, threading
from jax.errors import JaxRuntimeError
from latent_delib.errors import Outage, UserError
from latent_delib.machine import distributed

distributed.GRACE, distributed.SILENCE = 0.5, 2.0

def end(error, meanwhile):
    here, other = socket.socketpair()
    acts = {
        "closes": other.close,
        "lost a third": lambda: other.sendall(b"69 2\\n"),
        "": lambda: None,
    }
    with distributed.held_together(1, {0: here}):
        threading.Timer(0.2, acts[meanwhile]).start()  # the collective fails before it is known
        raise error

codes = []
for error, meanwhile in eval(sys.argv[1]):
    child = os.fork()
    if not child:
        end(error, meanwhile)
    codes.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in codes])
"""
GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer"
ENDINGS = {
    f"JaxRuntimeError({GLOO!r}), 'closes'": distributed.LOST,
    f"ValueError({GLOO!r}), 'closes'": distributed.LOST,
    f"JaxRuntimeError({GLOO!r}), 'lost a third'": distributed.LOST,
    f"JaxRuntimeError({GLOO!r}), ''": 1,
    "JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), ''": 1,
    "JaxRuntimeError('INTERNAL: Core halted unexpectedly'), ''": distributed.LOST,
    "RuntimeError('backend tpu: Device or resource busy'), ''": distributed.LOST,
    "TypeError('a bug'), ''": 1,
    "UserError('a mistake'), ''": 1,
    "OSError(28, 'No space left on device'), ''": 1,
    "Outage(103, 'UNAVAILABLE'), ''": distributed.LOST,
    "KeyboardInterrupt(), ''": 130,
}


def test_only_where_something_was_lost_is_a_job_to_start_again():
    cases = "".join(f"({case})," for case in ENDINGS)
    done = subprocess.run(
        [sys.executable, "-c", ENDS, f"[{cases}]"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"{list(ENDINGS.values())}\n", done.stderr


def call_roll(count, *others, seconds=5.0):
    """Process 0 and `others`, each (count, index) as told, in threads: how each of them ends."""
    address, ends = f"127.0.0.1:{free_port()}", {}

    def join(key, said, index):
        try:
            connections = roll_call.meet(address, said, index, seconds)
            ends[key] = sorted(connections)
            for connection in connections.values():
                connection.close()
        except UserError as error:
            ends[key] = str(error).replace(address, "ADDRESS")

    threads = [threading.Thread(target=join, args=("first", count, 0))]
    threads += [threading.Thread(target=join, args=(i, *other)) for i, other in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends.pop("first"), *(ends[i] for i in range(len(others)))


def test_the_roll():
    assert call_roll(3, (3, 2), (3, 1)) == ([1, 2], [0], [0])
    missing = (
        "--distributed: 2 of 4 processes did not connect to ADDRESS within 1 s: number 1, 3; "
        "is the command running on every worker, and the port open between them?"
    )
    assert call_roll(4, (4, 2), seconds=1.0) == (missing, missing), "everyone is told"
    for count, others, found in (
        (3, [(3, 1), (3, 1)], "1 of 3; expected 1 ... 2 of 3"),
        (2, [(3, 1)], "1 of 3; expected 1 ... 1 of 2"),
        (2, [(2, 2)], "2 of 2; expected 1 ... 1 of 2"),
    ):
        said = f"--distributed: a process on 127.0.0.1 was started as number {found}, "
        said += "each once, besides process 0"
        assert call_roll(count, *others) == (said, *[said for _ in others])


def test_a_process_that_is_started_again_before_all_are_there():
    address, found = f"127.0.0.1:{free_port()}", []
    first = threading.Thread(target=lambda: found.append(roll_call.meet(address, 3, 0, 30)))
    first.start()
    for line in ("GET / HTTP/1.1", "latent_delib 1 3"):  # a stranger, and one that is gone at once
        with connect(address) as connection:
            connection.sendall(f"{line}\n".encode())
    others = [
        threading.Thread(target=roll_call.meet, args=(address, 3, i, 30), daemon=True)
        for i in (2, 1)
    ]
    for thread in others:  # the second one last, or all would seem to be there
        thread.start()
        time.sleep(0.2)
    for thread in (first, *others):
        thread.join(10)
    assert sorted(found[0]) == [1, 2] and not any(thread.is_alive() for thread in others)


def connect(address):
    host, port = address.split(":")
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            time.sleep(0.05)


def test_a_listener_that_says_nothing():
    """Another service's, or a process 0 that was stopped: its kernel answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address, ends = f"127.0.0.1:{silent.getsockname()[1]}", []

        def join():
            try:
                roll_call.meet(address, 2, 1, 0.3)
            except UserError as error:
                ends.append(str(error))

        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(30)
    assert len(ends) == 1 and f"process 0 does not answer at {address} within 0.3 s" in ends[0]


def test_no_coordinator():
    with pytest.raises(
        UserError,
        match=r"process 0 does not answer at 127.0.0.1:\d+ within 0.5 s .Connection refused.",
    ) as e:
        roll_call.meet(f"127.0.0.1:{free_port()}", 2, 1, 0.5)
    assert "\n" not in str(e.value)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"cannot open port {port} of the coordinator: .*in use"
        ):
            roll_call.meet(f"127.0.0.1:{port}", 2, 0, 0.5)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are not all set"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expected a number"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS=here: expected HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:65536"}, "=a:65536: expected HOST:PORT"),
    ],
)
def test_an_environment_that_does_not_fit(monkeypatch, environment, message):
    whole = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    for name in whole:
        monkeypatch.delenv(name, raising=False)
    for name, value in ((whole | environment) if environment else {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        roll_call.find_place(1)


def test_votes_are_counted_on_any_mesh():
    vote = distributed.vote(mesh_lib.make({"data": 2, "fsdp": 2, "traces": 1, "tensor": 2}))
    assert [int(vote(said)) for said in (False, True, False)] == [0, 8, 0]


@pytest.mark.parametrize(
    "said, count",
    [
        ({}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, 2),
        ({"JAX_NUM_CPU_DEVICES": "2"}, 2),  # of launch/local.sh
    ],
)
def test_cores_become_devices_where_the_environment_does_not_say_how_many(said, count):
    code = "import jax; from latent_delib.machine import distributed; distributed.split_cores(3); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(jax.device_count())"],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | said,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == count
