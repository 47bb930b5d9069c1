"""What tests of text share: words, configs, token files, and when batches are equal."""

import numpy as np
from ml_collections import ConfigDict

WORDS = (
    "the cat sat on a mat and a dog ran to the door when rain fell over green hills at night"
).split()


def config_data(sources, weights=None, **fields):
    """A config.data; by default sources have equal weights, and validation reads them too."""
    data = {
        "sources": sources,
        "weights": weights or (1.0,) * len(sources),
        "validation": sources,
        "token_files": "",
        "seq_len": 16,
        "max_bad_records": 0,
    }
    return ConfigDict(data | fields)


def config_to_prepare(data, tokenizer):
    """A config with all that `prepare` reads."""
    decoder = {"path": "", "architecture": {}, "tokenizer": str(tokenizer)}
    return ConfigDict({"data": data, "decoder": decoder})


def write_token_files(folder, about, train, validation):
    """Writes token files; returns their meta.

    about: the meta, without its sources. train: source -> documents. validation: source -> the work
    and the tokens of each document.
    """
    from latent_delib.data import token_files

    meta = about | {"train": [], "validation": []}
    for i, (source, documents) in enumerate(train.items()):
        written = token_files.write_train(folder, i, documents, about)
        meta["train"].append({"source": source, **written})
    for i, (source, documents) in enumerate(validation.items()):
        written = token_files.write_validation(folder, i, documents, about)
        meta["validation"].append({"source": source, **written})
    token_files.write_meta(folder, meta)
    return meta


def equal(one, other):
    """Tells whether two lists of batches hold the same tokens and segments."""
    return all(
        np.array_equal(a[k], b[k])
        for a, b in zip(one, other, strict=True)
        for k in ("tokens", "segment")
    )
