"""Checkpoints of small trees: whole or absent, damage found out, on any mesh."""

import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latent_delib.errors import Outage, UserError
from latent_delib.machine import saved_steps
from latent_delib.machine.checkpoint import Checkpoints, open_for_reading
from latent_delib.machine.contents import leaf_sums
from tests.workdirs import flip

# What orbax leaves to the garbage collector of a read that failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TX = optax.adam(1e-3)
META = {"config": {"seed": 3, "rate": 0.1}}


def sharding(*shape):
    """Rows on the second, columns on the third axis of a mesh of this shape."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))


HERE = (1, 4, 2)


def make(seed, place):
    """A trainable tree and an optimizer state, too large to lie in the manifests."""
    key = jax.random.key(seed)
    tree = {
        "coprocessor": {
            "w": jax.random.normal(key, (64, 64)),
            "soft_tokens": jnp.full((8, 8), seed, jnp.bfloat16),
        }
    }
    tree = jax.device_put(tree, place)
    _, state = TX.update(jax.tree.map(jnp.cos, tree), TX.init(tree), tree)
    whole = NamedSharding(place.mesh, PartitionSpec())
    state = jax.tree.map(lambda x: jax.device_put(x, place if x.ndim else whole), state)
    return {"trainable": tree, "optimizer": state}


def wanted(tree, place):
    whole = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if x.ndim else whole), tree
    )


def both(place=None):
    """What a training job asks for."""
    place = place or sharding(*HERE)
    return wanted(make(0, place), place)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def settle(folder):
    """Waits until threads of this process that outlive a failed save write nothing more."""
    before, now = None, files(folder).keys()
    while before != now:
        time.sleep(0.5)
        before, now = now, files(folder).keys()


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def aside(workdir):
    """The step numbers of folders put aside, and the one folder there is, if any."""
    found = [p for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    return [p.name.split("-")[:2] for p in found], *found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir with steps 2 and 4, each of its own values."""
    workdir = tmp_path_factory.mktemp("finished")
    checkpoints = Checkpoints(str(workdir))
    for step in (2, 4):
        checkpoints.save(step, make(step, sharding(*HERE)), META | {"step": step})
    checkpoints.close()
    return workdir


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "workdir")


@pytest.mark.parametrize("shape", [HERE, (1, 2, 4), (8, 1, 1), (1, 8, 1), (2, 1, 4)])
def test_round_trip_onto_this_and_other_meshes(finished, shape):
    place = sharding(*shape)
    checkpoints, meta = open_for_reading(str(finished))
    step = meta["step"]
    restored = checkpoints.restore_newest(both(place), step=step).trees
    assert_equal(restored, make(4, sharding(*HERE)))
    for leaf in jax.tree.leaves(restored):
        assert not leaf.ndim or leaf.sharding == place


def test_the_trainable_tree_alone(saved):
    shutil.rmtree(saved / "checkpoints" / "4" / "optimizer")  # it is not even looked at
    checkpoints, meta = open_for_reading(str(saved))
    step = meta["step"]
    tree = make(4, sharding(*HERE))["trainable"]
    assert (step, meta) == (4, META | {"step": 4})
    restored = checkpoints.restore_newest(
        {"trainable": wanted(tree, sharding(1, 1, 8))}, step=4
    ).trees
    assert restored.keys() == {"trainable"}
    assert_equal(restored["trainable"], tree)


def test_shapes_need_not_be_known(finished):
    checkpoints, meta = open_for_reading(str(finished), step=2)
    step = meta["step"]
    restored = checkpoints.restore_newest(step=step).trainable
    assert_equal(restored, make(2, sharding(*HERE))["trainable"])
    assert {type(x) for x in jax.tree.leaves(restored)} == {np.ndarray}  # on no device


def test_one_more_tree(finished, tmp_path):
    """To store one more thing, such as a mean of the weights, takes no change of this room."""
    tree = make(2, sharding(*HERE))["trainable"]
    shapes = {"mean": wanted(tree, sharding(1, 1, 8))}
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(2, {"trainable": tree, "mean": tree}, META)
    assert_equal(checkpoints.restore_newest(shapes).trees, {"mean": tree})
    flip(largest(tmp_path / "checkpoints" / "2", "mean"), 0.4)
    with pytest.raises(UserError, match="checkpoint 2 is damaged .mean: "):
        checkpoints.restore_newest(shapes)
    with pytest.raises(UserError, match="checkpoint 4 has no mean"):
        Checkpoints(str(finished), read_only=True).restore_newest(shapes)


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """One that is stored in the repository, with Adam's count and mean of two leaves."""
    with tarfile.open(Path(__file__).parents[1] / "golden" / "checkpoint.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    checkpoints, meta = open_for_reading(str(tmp_path / "workdir"))
    step = meta["step"]
    assert (step, meta) == (2, META | {"step": 2})
    trees = checkpoints.restore_newest({"trainable": None, "optimizer": None}).trees
    weights = {
        "w": np.arange(12, dtype=np.float32).reshape(3, 4),
        "soft_tokens": jnp.ones((2, 4), jnp.bfloat16),
    }
    assert_equal(trees["trainable"], {"coprocessor": weights})
    assert_equal(trees["optimizer"], {"mu": {"coprocessor": weights}, "count": np.int32(2)})


def test_a_half_written_checkpoint_is_ignored(saved):
    root = saved / "checkpoints"
    half = root / "5.orbax-checkpoint-tmp"
    shutil.copytree(root / "4", half)
    shutil.rmtree(half / "optimizer")
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert open_for_reading(str(saved))[1]["step"] == 4
    assert half.exists(), "a reader cleans nothing up: the job may be about to finish it"
    checkpoints = Checkpoints(str(saved))
    assert checkpoints.restore_newest({}).step == 4
    trees = make(6, sharding(*HERE))
    checkpoints.save(6, trees, {"step": 6})
    checkpoints.close()
    assert not half.exists()
    assert_equal(
        open_for_reading(str(saved))[0].restore_newest(step=6).trainable, trees["trainable"]
    )


def test_what_is_not_there_is_named(finished, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}.*no checkpoints"):
        open_for_reading(str(tmp_path))
    assert not list(tmp_path.iterdir()), "looking for a checkpoint makes nothing"
    with pytest.raises(UserError, match=r"step 3; there are \[2, 4\]"):
        open_for_reading(str(finished), step=3)
    with pytest.raises(UserError, match=r"step 0; there are \[2, 4\]"):
        open_for_reading(str(finished), step=0)
    assert Checkpoints(str(tmp_path)).restore_newest(both()) is None


@pytest.fixture(scope="module", autouse=True)
def swept():
    """The remains of failed reads and writes raise where they are collected: not in other tests."""
    yield
    gc.collect()


def save_all(workdir, losses, **keep):
    """Steps of these losses by one job, a tiny tree each."""
    checkpoints = Checkpoints(str(workdir), **keep)
    for step, loss in losses.items():
        checkpoints.save(step, {"trainable": {"a": jnp.zeros(2)}}, {}, loss=loss)
    checkpoints.close()
    return steps(workdir)


def test_what_is_kept(tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert save_all(one, dict.fromkeys(range(1, 8), 1.0), keep=3) == [5, 6, 7]
    assert save_all(two, dict.fromkeys(range(1, 10), None), keep=1, keep_every=4) == [4, 8, 9]
    losses = {1: 3.0, 2: 0.5, 3: 0.7, 4: math.nan, 5: None, 6: 2.0}
    assert save_all(three, losses, keep=1, keep_best=2) == [2, 3, 6]
    # The losses outlive the process; a damaged one is no loss, and hides no checkpoint.
    (three / "checkpoints" / "3" / "metrics" / "metrics").write_text('{"lo')
    assert save_all(three, {7: 0.6, 8: 9.0, 9: jnp.float32(8.0)}, keep=1, keep_best=2) == [2, 7, 9]
    assert save_all(three, {10: 0.1, 20: 0.4, 21: 1.0}, keep=2, keep_every=10, keep_best=1) == [
        10,
        20,
        21,
    ]


def largest(folder, item):
    """The file with the most of an item's arrays."""
    return max((folder / item).rglob("d/*"), key=lambda p: p.stat().st_size)


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


# What happens to the folder of a checkpoint, and what is said of it. A flipped bit breaks the
# compression, or does not.
DAMAGE = {
    "metadata of the step missing": (
        lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
        "_CHECKPOINT_METADATA",
    ),
    "metadata of a tree missing": (
        lambda d: (d / "trainable" / "_METADATA").unlink(),
        "trainable: ",
    ),
    "metadata of a tree cut": (
        lambda d: cut(d / "optimizer" / "_METADATA", 0.5),
        "optimizer: Unterminated",
    ),
    "manifest missing": (
        lambda d: (d / "trainable" / "manifest.ocdbt").unlink(),
        "trainable: NOT_FOUND",
    ),
    "manifest changed": (
        lambda d: flip(d / "optimizer" / "manifest.ocdbt", 0.5),
        "4/optimizer/manifest.ocdbt",
    ),
    "array missing": (lambda d: largest(d, "trainable").unlink(), "trainable: .*coprocessor.w/"),
    "array cut": (lambda d: cut(largest(d, "optimizer"), 0.7), "optimizer: .*coprocessor.w/"),
    "array empty": (lambda d: cut(largest(d, "trainable"), 0), "trainable: .*coprocessor.w/"),
    "a bit of a parameter": (
        lambda d: flip(largest(d, "trainable"), 0.4),
        "trainable: (.*differs? from what was saved|.* failed)",
    ),
    "a bit of the optimizer": (
        lambda d: flip(largest(d, "optimizer"), 0.4),
        "optimizer: (.*differs? from what was saved|.* failed)",
    ),
    "meta cut": (lambda d: cut(d / "meta" / "metadata", 0.6), "meta: "),
    "meta empty": (lambda d: cut(d / "meta" / "metadata", 0), "meta: Expecting value"),
    "meta missing": (lambda d: (d / "meta" / "metadata").unlink(), "meta: No such file"),
    "meta changed": (
        lambda d: (d / "meta" / "metadata").write_text(json.dumps(META | {"step": 5})),
        "meta or contents differs? from what was saved",
    ),
    "contents cut": (lambda d: cut(d / "contents" / "metadata", 0.9), "contents: "),
    "contents of other bytes": (
        lambda d: (d / "contents" / "metadata").write_bytes(b"\xff\x00"),
        "contents: ",
    ),
    "contents of another kind": (
        lambda d: (d / "contents" / "metadata").write_text("[]"),
        "contents: ",
    ),
    "no meta": (lambda d: shutil.rmtree(d / "meta"), "meta: No such file"),
    "no parameters": (lambda d: shutil.rmtree(d / "trainable"), "trainable: no file"),
    "no optimizer": (lambda d: shutil.rmtree(d / "optimizer"), "optimizer: no file"),
    "nothing": (lambda d: [shutil.rmtree(d), d.mkdir()], "_CHECKPOINT_METADATA"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, name, capsys):
    damage, words = DAMAGE[name]
    damage(saved / "checkpoints" / "4")
    before = files(saved / "checkpoints" / "4")
    found = Checkpoints(str(saved)).restore_newest(both())
    assert (found.step, found.meta) == (2, META | {"step": 2})
    assert_equal(found.trees, make(2, sharding(*HERE)))
    names, folder = aside(saved)
    assert steps(saved) == [2] and names == [["DAMAGED", "4"]] and files(folder) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        f"checkpoint 4 is damaged .*{words}.*, checkpoint 2 is used instead; .* {folder.name}$",
        line,
    ), line
    assert line.startswith(f"warning: {saved}: ") and "\n" not in line and len(line) < 700


def test_after_damage_the_step_is_saved_again(saved):
    flip(largest(saved / "checkpoints" / "4", "trainable"), 0.5)
    checkpoints = Checkpoints(str(saved))
    assert checkpoints.restore_newest(both()).step == 2
    new = make(44, sharding(*HERE))
    checkpoints.save(4, new, {"again": True})
    checkpoints.save(6, new, {})
    checkpoints.close()
    assert steps(saved) == [4, 6] and aside(saved)[0] == [["DAMAGED", "4"]], (
        "what was put aside is not among the kept"
    )
    found = Checkpoints(str(saved)).restore_newest(both(), step=4)
    assert found.meta == {"again": True}
    assert_equal(found.trees, new)


def test_a_reader_renames_nothing(saved, capsys):
    flip(largest(saved / "checkpoints" / "4", "trainable"), 0.5)
    checkpoints, meta = open_for_reading(str(saved))
    step = meta["step"]
    assert step == 4, "its meta is whole"
    assert checkpoints.restore_newest().step == 2
    line = capsys.readouterr().err
    assert re.fullmatch(
        f"warning: {saved}: checkpoint 4 is .*, checkpoint 2 is used instead\n", line
    ), line
    cut(saved / "checkpoints" / "4" / "meta" / "metadata", 0.5)
    assert open_for_reading(str(saved))[1] == META | {"step": 2}
    assert steps(saved) == [2, 4] and aside(saved) == ([],)


def test_a_damaged_checkpoint_that_was_asked_for(saved):
    flip(largest(saved / "checkpoints" / "4", "trainable"), 0.5)
    checkpoints = Checkpoints(str(saved))
    words = f"^{saved}: checkpoint 4 is damaged .trainable: coprocessor.w differs from.*; "
    words += "name another step, one of .2."
    with pytest.raises(UserError, match=words):
        checkpoints.restore_newest(both(), step=4)
    cut(saved / "checkpoints" / "4" / "meta" / "metadata", 0.5)
    for read in (
        lambda step: checkpoints.restore_newest({}, step=step),
        lambda step: checkpoints.restore_newest(step=step),
        lambda step: open_for_reading(str(saved), step),
    ):
        with pytest.raises(UserError, match=r"checkpoint 4 is damaged \(meta: "):
            read(4)
    assert steps(saved) == [2, 4] and checkpoints.restore_newest({}, step=2).meta == META | {
        "step": 2
    }


def test_where_all_are_damaged_nothing_starts_from_scratch(saved):
    flip(largest(saved / "checkpoints" / "4", "trainable"), 0.5)
    shutil.rmtree(saved / "checkpoints" / "2" / "optimizer")
    for _ in range(2):  # a launcher tries again
        with pytest.raises(
            UserError, match=r"4 is damaged .*coprocessor.w.*2 is damaged .*no file.* no other"
        ):
            Checkpoints(str(saved)).restore_newest(both())
        assert steps(saved) == [2, 4]


class TooManyRequests(Exception):
    """As Google's client has it."""


class FailedPreconditionError(Exception):
    """As TensorFlow has it; of tensorstore the same words mean damage."""


@pytest.mark.parametrize(
    "error, outage",
    [
        (PermissionError(13, "Permission denied"), False),
        (ValueError("PERMISSION_DENIED: Error reading gs://b/x"), False),
        (ValueError("RESOURCE_EXHAUSTED: Error writing [os_error_code='28']"), False),
        (ValueError("UNAVAILABLE: later"), True),
        (TooManyRequests("429 later"), True),
        (
            FailedPreconditionError(
                "Error executing an HTTP request: libcurl code 6 meaning 'no such host'"
            ),
            True,
        ),
        (ConnectionResetError(104, "Connection reset by peer"), True),
    ],
)
def test_a_disk_or_store_that_fails_is_no_damage(saved, monkeypatch, error, outage):
    def fails(*args, **kwargs):
        raise error

    checkpoints = Checkpoints(str(saved))
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fails)
    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    trees = make(6, sharding(*HERE))
    for call in (
        lambda: checkpoints.restore_newest(both()),
        lambda: checkpoints.save(6, trees, META),
    ):
        with pytest.raises(OSError) as raised:
            call()
        assert isinstance(raised.value, Outage) == outage
    assert steps(saved) == [2, 4]


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_a_device_that_fails_is_no_store(saved, monkeypatch, kind):
    """Or a lack of memory would be an outage, after which a launcher starts the job again."""
    checkpoints = Checkpoints(str(saved))

    def fails(*args, **kwargs):
        raise kind("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    with pytest.raises(kind):
        checkpoints.save(6, make(6, sharding(*HERE)), META)


@pytest.mark.parametrize("name", ["mkdir", "iterdir", "is_dir"])
def test_a_store_that_does_not_answer_at_the_start_is_no_mistake(saved, monkeypatch, name):
    def fails(*args, **kwargs):
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(type(epath.Path("/")), name, fails)
    with pytest.raises(Outage, match="Connection timed out"):
        Checkpoints(str(saved))
    if name != "mkdir":
        with pytest.raises(Outage, match="Connection timed out"):
            open_for_reading(str(saved))


def test_another_tree_or_meta_is_no_damage(saved, monkeypatch):
    checkpoints = Checkpoints(str(saved))
    wanted = both()
    tree, state = wanted["trainable"], wanted["optimizer"]
    other = tree | {
        "coprocessor": tree["coprocessor"] | {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
    }
    words = r"checkpoint 4: trainable coprocessor.w is float32\[64, 64\], "
    words += r"expected float32\[64, 32\]"
    with pytest.raises(UserError, match=words):
        checkpoints.restore_newest(wanted | {"trainable": other})
    with pytest.raises(
        UserError,
        match=r"checkpoint 4: trainable more is nothing, expected float32\[64, 64\]",
    ):
        checkpoints.restore_newest({"trainable": tree | {"more": tree["coprocessor"]["w"]}})
    with pytest.raises(
        UserError, match=r"^--workdir=.*: optimizer 0.nu.* is bfloat16\[8, 8\], expected nothing"
    ):
        checkpoints.restore_newest({"optimizer": (state[0]._replace(nu={}), state[1])})

    def refuse(meta):
        raise UserError(f"not {meta['step']}")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", None)
    with pytest.raises(UserError, match="^not 4"):
        checkpoints.restore_newest(wanted, check=refuse)
    assert steps(saved) == [2, 4]


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "float8_e4m3fn"]
)
def test_one_bit_changes_the_sum_and_no_mesh_does(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(
        0, 2 if dtype == "bool" else 256, (16, 24 * jnp.dtype(dtype).itemsize)
    ).astype(np.uint8)
    x = raw.view(jnp.dtype(dtype))
    place = sharding(1, 4, 2)
    one = leaf_sums({"x": jax.device_put(x, place)})
    unsigned = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    assert one == {"x": int(unsigned.sum(dtype=np.uint64) % 2**32)}
    assert leaf_sums({"x": jax.device_put(x, jax.devices()[3])}) == leaf_sums({"x": x}) == one
    for _ in range(10):
        other = raw.copy()
        other.reshape(-1)[rng.integers(raw.size)] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
        assert leaf_sums({"x": jax.device_put(other.view(x.dtype), place)}) != one


def test_a_full_disk(saved, monkeypatch):
    # tensorstore's threads, after the failure
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = files(saved / "checkpoints")
    checkpoints = Checkpoints(str(saved))
    handler, limit = (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        checkpoints.save(6, make(6, sharding(*HERE)), {})  # in the background
        with pytest.raises(OSError, match=f"File too large: .*{saved}"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps(saved) == [2, 4] and before.items() <= files(saved / "checkpoints").items()
    settle(saved / "checkpoints")
    checkpoints = Checkpoints(str(saved))  # the job is started again
    assert checkpoints.restore_newest(both()).step == 4
    checkpoints.save(6, make(6, sharding(*HERE)), {})
    checkpoints.close()
    assert steps(saved) == [4, 6]


def test_a_folder_that_the_processes_do_not_share(saved, monkeypatch):
    """A copy of the run on a disk of its own, for instance."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(UserError, match="does not see the folder of process 0"):
        Checkpoints(str(saved))


@pytest.mark.parametrize("name", ["rate[1e-3]", "[!x]/run", "a\\b"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """It would store no array, and say nothing."""
    with pytest.raises(UserError, match=r"/checkpoints: a checkpoint's path cannot hold [\[\\]"):
        Checkpoints(str(tmp_path / name))
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(saved, tmp_path):
    """Not by permissions, which root does not feel: a file lies where the folder should."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").touch()
    with pytest.raises(
        UserError,
        match="checkpoints: is a file, expected a folder",
    ):
        Checkpoints(str(tmp_path / "other"))
    checkpoints = Checkpoints(str(saved))
    os.rename(saved / "checkpoints", saved / "moved")
    (saved / "checkpoints").touch()
    with pytest.raises(OSError, match="Not a directory"):
        checkpoints.save(6, make(6, sharding(*HERE)), {})
        checkpoints.wait()
    assert sorted(p.name for p in (saved / "moved").iterdir()) == ["2", "4"]


@pytest.mark.parametrize("missing", [["google.cloud.storage"], ["gcsfs", "tensorflow"]])
def test_the_package_for_gs(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", ModuleType("storage"))
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    for use in (Checkpoints, open_for_reading):
        with pytest.raises(UserError, match=f"{missing[0]} is not installed: .*setup.sh tpu"):
            use("gs://bucket/run")


def test_after_an_error_a_started_save_becomes_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, make(0, sharding(*HERE)), META)
        1 / 0  # noqa: B018
    assert saved_steps.whole_steps(str(tmp_path)) == {1}


def test_an_error_stays_the_one_raised_where_the_save_fails_too(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("the disk is full")

    monkeypatch.setattr(ocp.CheckpointManager, "close", fail)
    with pytest.raises(ZeroDivisionError), Checkpoints(str(tmp_path)):
        1 / 0  # noqa: B018
