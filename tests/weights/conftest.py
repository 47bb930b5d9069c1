"""The small random models of the golden values, as Hugging Face folders."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import stored


@pytest.fixture
def hf(tokenizer_path, tmp_path):
    """hf(family, tensors=None, **changes of config.json) -> a Hugging Face folder."""
    from safetensors.numpy import save_file

    def make(family: str, tensors: dict | None = None, **changes) -> Path:
        config, own = stored(family)
        where = tmp_path / f"{family}_{len(list(tmp_path.iterdir()))}"
        where.mkdir()
        (where / "config.json").write_text(json.dumps(config | changes))
        save_file(own if tensors is None else tensors, where / "model.safetensors")
        shutil.copy(tokenizer_path, where / "tokenizer.model")
        return where

    return make
