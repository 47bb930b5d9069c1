"""The small random models of the golden values, and a conversion that must be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from latent_delib.convert import convert
from latent_delib.errors import UserError

FAMILIES = ("gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3", "gpt2")


def stored(family: str) -> tuple[dict, dict[str, np.ndarray]]:
    """A golden model as `transformers` has it: config.json and tensors, float16."""
    with np.load(Path(__file__).with_name("golden") / f"{family}.npz", allow_pickle=False) as file:
        return json.loads(str(file["config"])), load(file["decoder"].tobytes())


def refused(source, out, *words, **arguments):
    """A conversion ends in a UserError of one line that holds the words, and leaves nothing."""
    with pytest.raises(UserError) as error:
        convert(str(source), str(out), **arguments)
    for word in words:
        assert str(word) in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists() and not list(out.parent.glob(f"{out.name}.*"))
