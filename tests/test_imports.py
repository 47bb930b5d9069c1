"""Who imports whom, by the sources; what a process that trains from token files loads."""

import ast
import subprocess
import sys

import pytest
from package import imports, sources

# The rooms from the ground up: each may import itself and the rooms above it in this list, no
# other.
ROOMS = [
    "errors",
    "machine",
    "nn",
    "mesh",
    "delib",
    "weights",
    "data",
    "job",
    "lm",
    "measure",
    "results",
]
DOORS = ["train", "evaluate", "generate", "prepare", "convert", "benchmark", "report"]
# `results` is for doors alone; `data` knows no arrays of ours, `weights` no methods.
FORBIDDEN = {
    "data": {"nn", "mesh", "delib", "weights"},
    "weights": {"mesh", "delib"},
    "machine": set(),
}


def ours(source: str, name: str) -> set[str]:
    """The rooms of this package that a module imports."""
    return {i.split(".")[1] for i in imports(source, name) if i.split(".")[0] == "latent_delib"}


def test_the_rooms_are_those_of_the_map():
    rooms = {name.split("/")[0] for name in sources()}
    assert rooms == {*ROOMS, *DOORS, "__init__", "__main__"}


def test_imports_run_one_way():
    for name, source in sources().items():
        room = name.split("/")[0]
        if room not in ROOMS:
            continue
        allowed = set(ROOMS[: ROOMS.index(room) + 1]) - FORBIDDEN.get(room, set())
        assert ours(source, name) <= allowed, f"{name} imports {ours(source, name) - allowed}"


def test_the_package_imports_nothing_beside_it():
    for name, source in sources().items():
        found = {i.split(".")[0] for i in imports(source, name)}
        assert not found & {"benchmarks", "configs", "tests", "tools"}, name


def test_no_door_imports_another():
    for door in DOORS:
        assert not ours(sources()[door], door) & set(DOORS), door


@pytest.mark.parametrize(
    "packages, users",
    [
        ({"tensorflow", "tensorflow_text"}, {"data/tensorflow"}),
        ({"tensorflow_datasets", "array_record"}, {"data/tfds_datasets"}),
        ({"datasets"}, {"data/hub_datasets", "measure/harness_tasks"}),
        ({"seqio"}, {"data/tasks"}),
        ({"torch", "transformers"}, set()),
        ({"orbax"}, {"machine/checkpoint", "weights/deepmind"}),
        ({"gguf"}, {"weights/gguf"}),
        ({"wandb"}, {"job/wandb_run"}),
    ],
)
def test_heavy_packages_stay_in_their_room(packages, users):
    found = {
        n
        for n, source in sources().items()
        if {i.split(".")[0] for i in imports(source, n)} & packages
    }
    assert found == users


def test_every_random_key_is_of_the_same_generator():
    users = {name for name, source in sources().items() if "random.key(" in source}
    assert users == {"machine/seeds"}


def test_tensorflow_is_imported_only_when_text_needs_it():
    """At the top of a module the import would load TensorFlow into every process."""
    for name, source in sources().items():
        top = "\n".join(
            ast.unparse(n)
            for n in ast.parse(source).body
            if isinstance(n, ast.Import | ast.ImportFrom)
        )
        heavy = {"tensorflow.tf", "tasks", "tfds_datasets", "hub_datasets"}
        heavy = {f"latent_delib.data.{each}" for each in heavy}
        assert name == "data/tasks" or not heavy & set(imports(top, name)), name


def test_training_loads_no_tensorflow():
    """Nor transformers. tensorboardX loads torch only where that is installed."""
    code = (
        "import sys, latent_delib.train, latent_delib.evaluate, latent_delib.generate;"
        "import latent_delib.prepare;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'tensorflow', 'seqio', 'tensorflow_datasets', 'datasets', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_preparing_text_loads_no_jax():
    code = "import sys, latent_delib.prepare; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
