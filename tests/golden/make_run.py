"""Makes a tiny run in an empty folder, of two steps of four, and expected.json.

    python -m tests.golden.make_run FOLDER

version_0_1.tar.gz is such a folder, made by the package before checkpoints had a format number. It
is never made again: tests/test_old_run.py shows that later versions read it. Paths in its config
are relative to the folder.
"""

import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import sentencepiece

from configs import base
from latent_delib import evaluate, train
from latent_delib.data import token_files
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.machine import files
from latent_delib.nn import transformer
from latent_delib.nn.sizes import SIZES
from latent_delib.weights import folder, tokenizer_files
from tests.texts import WORDS

SIZE = {
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 8,
    "ffn_dim": 8,
}
CHANGES = {
    "decoder.path": "decoder",
    "method.num_latents": 2,
    "method.num_traces": 2,
    "method.num_ahead": 2,
    "data.sources": ("files:train.txt",),
    "data.validation": ("files:validation.txt",),
    "data.token_files": "tokens",
    "data.seq_len": 16,
    "optimizer.learning_rate": 1e-2,
    "optimizer.soft_token_learning_rate": 1e-2,
    "optimizer.warmup_steps": 1,
    "optimizer.eps": 1e-3,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "compute.dtype": "float32",
    "compute.remat": "none",
    "compute.loss_chunk": 8,
    "evaluate.num_ahead": 2,
    "evaluate.max_length": 16,
    "evaluate.positions": 8,
}


def make_config():
    """Returns the run's config."""
    config = base.get_config()
    config.update_from_flattened_dict(CHANGES)
    return config.lock()


def make_texts(split: str, count: int) -> list[str]:
    draw = random.Random(split)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(3, 40))) for _ in range(count)]


def make_decoder(texts: list[str]) -> None:
    """Writes decoder/: random weights in bfloat16, and a tokenizer of 300 pieces."""
    Path("text").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input="text",
        model_prefix="tokenizer",
        model_type="bpe",
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    architecture = dataclasses.replace(SIZES["gemma2_test"], vocab_size=300, **SIZE)
    leaves = folder.by_name(transformer.init(jax.random.key(1), architecture))
    dtype = np.dtype(ml_dtypes.bfloat16)
    entries = {name: (leaf.shape, dtype) for name, leaf in leaves.items()}
    with files.atomic_folder(Path("decoder")) as partial:
        tokenizer_files.copy_tokenizer(Path("tokenizer.model"), partial)
        folder.write_model(
            partial, architecture, entries, (np.asarray(x).astype(dtype) for x in leaves.values())
        )
    for name in ("text", "tokenizer.model", "tokenizer.vocab"):
        Path(name).unlink()


def make_tokens(texts: list[str], validation: list[str]) -> None:
    """Writes tokens/."""
    path = "decoder/tokenizer.model"
    tokenizer = Tokenizer(path)
    meta = {
        "format": token_files.FORMAT,
        "seq_len": CHANGES["data.seq_len"],
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": "uint16",
        "tokenizer_sha256": token_files.fingerprint(path),
    }
    train_tokens = [np.array(tokenizer.encode(text), np.int32) for text in texts]
    held_out = [
        ("validation.txt", np.array(tokenizer.encode(text), np.int32)) for text in validation
    ]
    written = token_files.write_train("tokens", 0, train_tokens, meta)
    meta["train"] = [{"source": "files:train.txt", **written}]
    written = token_files.write_validation("tokens", 0, held_out, meta)
    meta["validation"] = [{"source": "files:validation.txt", **written}]
    token_files.write_meta("tokens", meta)


def main(where: str) -> None:
    os.chdir(where)
    texts = make_texts("train", 60)
    make_decoder(texts)
    make_tokens(texts, make_texts("validation", 6))
    train.train(make_config(), "workdir")
    metrics = Path("workdir/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    shutil.rmtree("workdir/checkpoints/4")
    result = evaluate.evaluate(make_config(), "workdir", "out")
    expected = {
        "losses": [row["loss"] for row in rows],
        "rows": result["rows"],
        "step": result["step"],
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    for folder_name in ("workdir/tensorboard", "out"):
        shutil.rmtree(folder_name)


if __name__ == "__main__":
    main(sys.argv[1])
