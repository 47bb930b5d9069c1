"""Writes llama.npz: what make_gemma2.py computes, for a tiny random Llama (SiLU, no softcaps, no window).

python tests/golden/make_llama.py [--check]
"""

from pathlib import Path

import torch
from make_gemma2 import main, values
from transformers import LlamaConfig, LlamaForCausalLM


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(__file__).with_name("llama.npz"), values(LlamaForCausalLM, config(), norm=1.0))
