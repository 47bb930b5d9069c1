"""Writes gemma2.npz: what a tiny random Gemma 2 computes in `transformers`, plain and with latents (Liu et al. 2025).

  python tests/golden/make_gemma2.py            writes tests/golden/gemma2.npz
  python tests/golden/make_gemma2.py --check    computes it again and compares

Needs torch and transformers (made with 2.13.0 and 5.23.0); nothing of latent_delib is imported. One trace at a time,
with the cache of exactly the text it may see, so that no visibility is left to a mask but the sliding window.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

B, T, L, A = 2, 24, 3, 6  # prompts, their tokens, latents, ahead tokens
POSITIONS = [[0, 1, 9, 17], [2, 5, 12, 16]]  # with overlay and p < L - 1, latents are clipped to position 0


def config() -> Gemma2Config:
    return Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=25,
        sliding_window=5,
        attn_logit_softcapping=3.0,  # low enough to bend what random weights give
        final_logit_softcapping=4.0,
        attn_implementation="eager",
    )


def randomise(model: torch.nn.Module, random: np.random.Generator, norm: float) -> None:
    """Every weight anew, in values that float16 holds; norms' scatter around `norm`, or a mistake in them hides."""
    for parameter in model.parameters():
        noise = random.standard_normal(tuple(parameter.shape))
        values = norm + 0.3 * noise if parameter.ndim == 1 else 1.5 * noise * parameter.shape[-1] ** -0.5
        parameter.data = torch.from_numpy(values.astype(np.float16)).float()


def call(model, x: torch.Tensor, position: torch.Tensor, text: DynamicCache, length: int):
    """A model over inputs x [S, D] at `position`, which see the first `length` tokens of the text and themselves.

    The library's own sliding mask counts slots of the cache; latents may share positions, so it is built here.
    """
    cache = DynamicCache()  # without a config no layer of it forgets what left the window
    for i, layer in enumerate(text.layers):
        cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], i)
    own = torch.arange(len(x))
    visible = torch.cat([torch.ones(len(x), length, dtype=bool), own <= own[:, None]], dim=1)
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
    if window := getattr(model.config, "sliding_window", None):
        key_position = torch.cat([torch.arange(length), position])
        near = position[:, None] - key_position < window
        mask = {"full_attention": mask, "sliding_attention": mask.masked_fill(~near, -torch.inf)}
    return model(inputs_embeds=x[None], position_ids=position[None], past_key_values=cache, attention_mask=mask)


def values(model_class: type, config, norm: float) -> dict[str, np.ndarray]:
    """Weights, inputs and outputs. `norm` is the norm weight that leaves its input as it is."""
    random = np.random.default_rng(0)
    decoder, coprocessor = model_class(config).eval(), model_class(config).eval()
    for model in (decoder, coprocessor):
        randomise(model, random, norm)
    soft = torch.from_numpy(random.standard_normal((L, config.hidden_size)).astype(np.float16)).float()
    tokens = torch.from_numpy(random.integers(0, config.vocab_size, (B, T)))

    # Token embeddings are scaled inside the table's lookup, so latents enter as they are. Older releases scale
    # whatever comes in as inputs_embeds: this line refuses them.
    embed, plain = decoder.get_input_embeddings(), decoder(tokens).logits
    torch.testing.assert_close(decoder(inputs_embeds=embed(tokens)).logits, plain)

    out = {f"decoder.{k}": v for k, v in decoder.model.state_dict().items()}
    out |= {f"coprocessor.{k}": v for k, v in coprocessor.model.state_dict().items() if "embed_tokens" not in k}
    out = {k: v.half() for k, v in (out | {"soft_tokens": soft}).items()}
    out |= {"tokens": tokens, "positions": torch.tensor(POSITIONS), "logits": plain}
    results: dict[str, list[torch.Tensor]] = {}
    for b, row in enumerate(tokens):
        text = DynamicCache()
        decoder(row[None], past_key_values=text)
        for p in POSITIONS[b]:
            ahead = row[p + 1 : p + 1 + A]

            def picked(logits: torch.Tensor, ahead=ahead) -> torch.Tensor:
                return logits[-A:].log_softmax(-1).gather(-1, ahead[:, None])[:, 0]

            results.setdefault("logprobs.decoder", []).append(picked(plain[b, : p + A]))
            # after: latents at p+1 ... p+L, then the ahead tokens. overlay: latents at p-L+1 ... p instead of x_p's
            # entry, then x_p and the ahead tokens, each where it stands in the text.
            for placement, first, reread, shift in (("after", p + 1, 0, L), ("overlay", p - L + 1, 1, 0)):
                latent_position = (first + torch.arange(L)).clamp(min=0)
                z = call(coprocessor.model, soft, latent_position, text, p + 1).last_hidden_state[0]
                index = torch.arange(p + 1 - reread, p + A)
                position = torch.cat([latent_position, index + shift])
                x = torch.cat([z, embed(row[index])])
                logits = call(decoder, x, position, text, p + 1 - reread).logits[0]
                results.setdefault(f"latents.{placement}", []).append(z)
                results.setdefault(f"logprobs.{placement}", []).append(picked(logits))
    out |= {k: torch.stack(v).unflatten(0, (B, -1)) for k, v in results.items()}
    return {k: v.numpy() for k, v in out.items()}


def main(path: Path, found: dict[str, np.ndarray]) -> None:
    """Writes the values, or compares them with what is written."""
    if "--check" not in sys.argv:
        np.savez_compressed(path, **found)
        return
    with np.load(path, allow_pickle=False) as stored:
        assert set(stored) == set(found), set(stored) ^ set(found)
        for name, value in found.items():
            np.testing.assert_allclose(value, stored[name], rtol=0, atol=1e-5, err_msg=name)
    print(f"{path.name}: {len(found)} arrays agree")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(__file__).with_name("gemma2.npz"), values(Gemma2ForCausalLM, config(), norm=0.0))
