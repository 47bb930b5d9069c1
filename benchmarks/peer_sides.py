"""Holds the sides of `peers`: the package's work, and the same by PyTorch and its like.

A side is a function of the command line's values, `folder` and `smollm2` among them. It gets
everything ready, and returns its work. It runs in a process of its own, so it imports what it needs
itself.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs import packaged_decoder, quickstart
from latent_delib.nn.sizes import SIZES, TransformerConfig

CORPUS = Path(__file__).parents[1] / "latent_delib" / "data" / "corpus"
SPLITS = ("train", "validation")
COPIES = 2  # of the packaged corpus are prepared: 16 MB
STEPS = 4  # of training, in one call
TEXTS, TEXT_TOKENS = 24, 256  # scored; a longer paragraph is cut
PROMPT, NEW = 32, 64  # tokens of a prompt, and decoded after it
DECODER = SIZES["gemma2_3m"]
TINY = dataclasses.replace(
    DECODER,
    num_layers=2,
    embed_dim=64,
    head_dim=16,
    ffn_dim=256,
    vocab_size=512,
    query_scale=0.0,
)


class Work(NamedTuple):
    """Holds what a side does in one call: `run` returns figures, or None.

    amount: how much that is, in the unit of its row.
    """

    run: Callable[[], Sequence[float] | None]
    amount: float


# Training.


def decoder_job(a: argparse.Namespace) -> tuple[ConfigDict, TransformerConfig]:
    """Returns the training of a decoder of 3.15 M parameters."""
    del a
    config = packaged_decoder.get_config()
    config.decoder.architecture = ConfigDict(dataclasses.asdict(DECODER))
    config.decoder.tokenizer = "packaged"
    config.data.seq_len = 256
    config.train.batch_size = 8
    return config, DECODER


def tiny_job(a: argparse.Namespace) -> tuple[ConfigDict, TransformerConfig]:
    """Returns the same for a smaller decoder, with more and shorter rows."""
    config = packaged_decoder.get_config()
    config.decoder.architecture = ConfigDict(dataclasses.asdict(TINY))
    config.decoder.tokenizer = str(vocabulary(a.folder))
    return config, TINY


def coprocessor_job(a: argparse.Namespace) -> tuple[ConfigDict, TransformerConfig]:
    """Returns the training of a coprocessor over such a decoder: 8 traces of 8 latents per row."""
    config, architecture = decoder_job(a)
    config.method = quickstart.get_config().method
    config.method.num_latents = 8
    config.method.num_traces = 8
    return config, architecture


def random_batch(config: ConfigDict, vocab_size: int) -> dict[str, np.ndarray]:
    """Draws tokens and their segments, int32 [B, T] each: every row one document."""
    shape = config.train.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
    return {"tokens": tokens, "segment": np.ones(shape, np.int32)}


def train_ours(a: argparse.Namespace, *, job: Callable) -> Work:
    """Trains as `train` does, on its mesh of this machine; values are read one step late."""
    from latent_delib import mesh, train
    from latent_delib.job import experiment, plan

    config, architecture = job(a)
    exp = experiment.read(config)
    planned = plan.make(exp)
    state, frozen = train.place_state(exp, planned, None)
    step = plan.compile_step(exp, planned)
    batch = random_batch(config, architecture.vocab_size)

    def run() -> None:
        nonlocal state
        values = None
        for _ in range(STEPS):
            before = values
            placed = mesh.place_rows(exp.mesh, batch, len(batch["tokens"]))
            state, values = step(state, frozen, placed)
            if before is not None:
                float(before["loss"])
        float(values["loss"])

    return Work(run, STEPS * batch["tokens"].size)


def train_theirs(a: argparse.Namespace, *, job: Callable, compiled: bool) -> Work:
    """Trains the peer on the same job."""
    import torch

    from benchmarks.peer_steps import DecoderPeer, Peer

    all_cores()
    config, c = job(a)
    method = config.method
    arrays = random_batch(config, c.vocab_size)
    batch = [torch.from_numpy(arrays[name]).long() for name in ("tokens", "segment")]
    if method.name == "decoder":
        step = partial(DecoderPeer(c, config.optimizer, compiled).step, *batch)
    else:
        sizes = method.num_latents, method.num_ahead, method.placement
        peer = Peer(c, *sizes, config.optimizer, "cpu", compiled, checkpointed=False)
        step = partial(peer.step, *batch, method.num_traces)

    def run() -> None:
        for _ in range(STEPS):
            step().item()

    return Work(run, STEPS * arrays["tokens"].size)


def all_cores() -> None:
    """Gives torch a thread for each core that the process may use."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


# SmolLM2-135M.


def texts(a: argparse.Namespace) -> list[list[int]]:
    """Returns the ids of TEXTS paragraphs, spread over the packaged validation text; BOS first."""
    from latent_delib.data.tokenizer import Tokenizer

    if not a.smollm2.is_dir():
        sys.exit(f"--smollm2={a.smollm2}: no such folder; the commands that make it are in --help")
    tokenizer = Tokenizer(a.smollm2 / "tokenizer.json")
    files = sorted((CORPUS / "validation").glob("*.txt"))
    paragraphs = []
    for file in files:
        paragraphs += [text for text in file.read_text().split("\n\n") if len(text) >= 400]
    chosen = paragraphs[:: len(paragraphs) // TEXTS][:TEXTS]
    return [[tokenizer.bos_id, *tokenizer.encode(text)][:TEXT_TOKENS] for text in chosen]


def our_model(a: argparse.Namespace) -> Any:
    """Returns the plain decoder on one device, in float32."""
    import jax.numpy as jnp

    import latent_delib as ld

    return ld.AugmentedLM(ld.load_decoder(a.smollm2, jnp.float32))


def their_model(a: argparse.Namespace) -> Any:
    """Returns the same weights in transformers, in float32; converts them where that is to do."""
    import torch
    import transformers

    all_cores()
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    folder = a.folder / "huggingface"
    if not folder.exists():
        command = [sys.executable, "-m", "latent_delib.convert", f"--source={a.smollm2}"]
        command += [f"--out={folder}", "--to=huggingface"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # no row ends early
    return model.eval()


def score_ours(a: argparse.Namespace) -> Work:
    model, given = our_model(a), texts(a)
    return Work(partial(model.rolling_logprobs, given), sum(len(ids) - 1 for ids in given))


def score_theirs(a: argparse.Namespace) -> Work:
    """Scores one text at a time: no padding."""
    import torch

    model, given = their_model(a), texts(a)
    rows = [torch.tensor([ids]) for ids in given]

    def one(row: Any) -> float:
        logits = model(row, use_cache=False).logits[0, :-1]
        return -torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()

    return Work(lambda: [one(row) for row in rows], sum(len(ids) - 1 for ids in given))


def decode_ours(a: argparse.Namespace, *, batch: int) -> Work:
    model, prompts = our_model(a), [ids[:PROMPT] for ids in texts(a)[:batch]]

    def run() -> np.ndarray:
        found = np.stack([c.tokens for c in model.continuations(prompts, NEW, batch_size=batch)])
        assert (found[:, -1] != model.tokenizer.pad_id).all(), "a row ended early"
        return found.ravel()

    return Work(run, batch * NEW)


def decode_theirs(a: argparse.Namespace, *, batch: int) -> Work:
    import torch

    model, prompts = their_model(a), torch.tensor([ids[:PROMPT] for ids in texts(a)[:batch]])
    options = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False)
    return Work(lambda: model.generate(prompts, **options)[:, PROMPT:].numpy().ravel(), batch * NEW)


# Preparing text.


def vocabulary(folder: Path) -> Path:
    """Returns a SentencePiece model of 512 pieces; trains it on validation text where missing."""
    import sentencepiece

    model = folder / "vocabulary.model"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / "unfinished"
        sentencepiece.SentencePieceTrainer.train(
            input=",".join(str(file) for file in sorted((CORPUS / "validation").glob("*.txt"))),
            model_prefix=str(made),
            model_type="bpe",
            vocab_size=TINY.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            minloglevel=2,
        )
        made.with_suffix(".model").rename(model)
    return model


def text_files(folder: Path) -> list[Path]:
    """Returns the files of text to prepare: the packaged corpus, copied COPIES times."""
    files = []
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
        for file in sorted((CORPUS / split).glob("*.txt")):
            for copy in range(COPIES):
                files.append(folder / split / f"{copy}_{file.name}")
                shutil.copyfile(file, files[-1])
    return files


def megabytes(files: Sequence[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def prepare_ours(a: argparse.Namespace) -> Work:
    """Runs the command, from its start to its end."""
    text, out = a.folder / "text", a.folder / "tokens"
    files = text_files(text)
    command = [
        *(sys.executable, "-m", "latent_delib.prepare", f"--out={out}"),
        "--config=configs/quickstart.py",
        f"--config.decoder.tokenizer={vocabulary(a.folder)}",
        f"--config.data.sources=('files:{text}/train/*.txt',)",
        f"--config.data.validation=('files:{text}/validation/*.txt',)",
    ]

    def run() -> list[float]:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        meta = json.loads((out / "meta.json").read_text())
        entries = [entry for split in SPLITS for entry in meta[split]]
        return [sum(entry[key] for entry in entries) for key in ("documents", "tokens")]

    return Work(run, megabytes(files))


def prepare_theirs(a: argparse.Namespace) -> Work:
    """Reads the files, and tokenizes each document by the library: one thread, no start-up."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary(a.folder)))
    files = text_files(a.folder / "text")

    def run() -> list[float]:
        documents = []
        for file in files:
            for text in file.read_text().split("\n\f\n"):
                documents.append(np.array(model.encode(text), np.uint16))
        return [len(documents), sum(map(len, documents))]

    return Work(run, megabytes(files))
