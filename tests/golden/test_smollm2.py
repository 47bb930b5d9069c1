"""SmolLM2-135M, imported from a GGUF, against what make_smollm2.py stored of `transformers`."""

import json
from pathlib import Path

import numpy as np
import pytest

import latent_delib as ld

pytestmark = pytest.mark.slow  # its weights take 0.75 GB


@pytest.fixture(scope="module")
def stored():
    return json.loads(Path(__file__).with_name("smollm2.json").read_text())


@pytest.fixture(scope="module")
def lm(smollm2_folder, free_memory):
    free_memory()
    return ld.AugmentedLM(ld.load_decoder(smollm2_folder))


def test_text(stored, lm):
    every = []
    for text in stored["texts"]:
        assert [lm.tokenizer.bos_id, *lm.tokenizer.encode(text["text"])] == text["tokens"]
        ahead = len(text["tokens"]) - 1
        logprobs, _ = lm.ahead_logprobs([text["tokens"]], [[0]], ahead)
        np.testing.assert_allclose(logprobs[0, 0], text["logprobs"], rtol=0, atol=1e-3)
        every.append(logprobs[0, 0])
    perplexity = np.exp(-np.concatenate(every).mean())
    print(f"perplexity {perplexity:.4f}, stored {stored['perplexity']:.4f}")
    assert perplexity == pytest.approx(stored["perplexity"], rel=5e-5)


def test_greedy_decoding(stored, lm):
    length = len(stored["greedy"][0]["tokens"])
    found = lm.generate([case["prompt"] for case in stored["greedy"]], max_new_tokens=length)
    assert found == [case["text"] for case in stored["greedy"]]


def test_ragged_greedy_decoding(stored, lm):
    """64 prompts of 8 to 323 tokens, 16 at a time, go on as each does by itself there."""
    cases = stored["ragged"]
    prompts = [case["text"] for case in cases]
    for case, prompt in zip(cases, prompts):
        assert [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)] == case["tokens"]
    assert len(cases) == 64
    for case, found in zip(cases, lm.continuations(prompts, max_new_tokens=64)):
        new = case["new"]  # shorter where EOS ended it
        assert len(new) == 64 or new[-1] == lm.tokenizer.eos_id
        padded = new + [lm.tokenizer.pad_id] * (64 - len(new))
        near = f"{case['text']}: its two largest logits came within {case['gap']}"
        assert found.tokens.tolist() == padded, near
