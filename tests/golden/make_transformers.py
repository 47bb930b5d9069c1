"""Writes FAMILY.npz: what small random models compute in `transformers`, plain and with latents.

  python tests/golden/make_transformers.py            writes tests/golden/FAMILY.npz
  python tests/golden/make_transformers.py --check    computes them again and compares

Needs torch and transformers (made with 2.13.0 and 5.23.0, qwen2 with 2.14.1 and 5.24.0, gpt2 with
2.13.0 and 5.24.0); nothing of latent_delib is imported. A file holds

  config          config.json as transformers 5 writes it
  config_4        as releases before it did, and most folders have it
  decoder         model.safetensors as transformers writes it, in bytes
  coprocessor     another model of the same family
  tokens, logits  [B, T], [B, T, V]
  hidden          [layers, B, T, D], the final norm of what each layer gives out
  positions, latents.PLACEMENT, logprobs.decoder, logprobs.PLACEMENT
                  the whole method (Liu et al. 2025)

The method is computed one trace at a time, with the cache of exactly the text the trace may see, so
that no visibility is left to a mask but the sliding window.
"""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from stored import main, rounded
from transformers import DynamicCache, PreTrainedModel

B, T, L, A = 2, 24, 3, 6  # prompts, their tokens, latents, ahead tokens
# with overlay and p < L - 1, latents are clipped to position 0
POSITIONS = [[0, 1, 9, 17], [2, 5, 12, 17]]

# Softcaps are low enough to bend what random weights give, and no two rotary bases are alike.
LOCAL = dict(query_pre_attn_scalar=20, sliding_window=5)
# Pairs of features come round after 6, 30, 140 and 664 tokens: one is kept (context / high = 16),
# one is between, two are slowed down (context / low = 64).
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0
)
LLAMA3 |= dict(original_max_position_embeddings=64)
GEMMA3 = {
    "full_attention": dict(rope_type="linear", rope_theta=5000.0, factor=4.0),
    "sliding_attention": dict(rope_type="default", rope_theta=100.0),
}
# GPT-2's own words for what the others' configs say; it has more positions than the texts need.
GPT2_WORDS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
}
GPT2_HAS_NONE = ("num_key_value_heads", "head_dim")
# Family -> its classes' name, (layers, D, N, K, F), what else its config says, the norm weight that
# changes nothing.
FAMILIES = {
    "gemma": ("Gemma", (3, 24, 4, 1, 40), dict(), 0.0),
    "gemma2": (
        "Gemma2",
        (5, 24, 4, 2, 32),
        dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0) | LOCAL,
        0.0,
    ),
    "gemma3": ("Gemma3", (7, 24, 2, 1, 32), dict(rope_parameters=GEMMA3) | LOCAL, 0.0),
    "llama": ("Llama", (3, 36, 9, 3, 32), dict(rope_parameters=LLAMA3), 1.0),
    "qwen2": (
        "Qwen2",
        (3, 24, 4, 2, 40),
        dict(
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1000.0)
        ),
        1.0,
    ),
    "qwen3": (
        "Qwen3",
        (3, 24, 4, 2, 40),
        dict(rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
        1.0,
    ),
    "gpt2": ("GPT2", (3, 24, 3, 3, 40), dict(max_position_embeddings=64), 1.0),
}


def new_model(family: str, random: np.random.Generator) -> PreTrainedModel:
    """A model of the family, every weight at random: norms scatter too, or a mistake in them hides.

    Values are multiples of 1/64, which float16 holds and zip packs well.
    """
    name, (layers, D, N, K, F), others, norm = FAMILIES[family]
    fields = dict(
        vocab_size=320,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-3,  # a wrong one is seen
        attn_implementation="eager",
    )
    fields |= dict(tie_word_embeddings=True) | others
    config_name, model_name = f"{name}Config", f"{name}ForCausalLM"
    if family == "gemma3":
        config_name = "Gemma3TextConfig"
    if family == "gpt2":
        model_name = "GPT2LMHeadModel"
        fields = {GPT2_WORDS.get(k, k): v for k, v in fields.items() if k not in GPT2_HAS_NONE}
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**fields)).eval()
    for name, parameter in model.named_parameters():
        noise = random.standard_normal(tuple(parameter.shape))
        if parameter.ndim == 1:
            values = 0.3 * noise + (0.0 if name.endswith("bias") else norm)
        else:
            values = 1.5 * noise * parameter.shape[-1] ** -0.5
        parameter.data = torch.from_numpy(np.round(values * 64) / 64).float()
    return model


def saved(model: PreTrainedModel) -> tuple[str, np.ndarray]:
    """config.json, and model.safetensors in float16, as bytes: smaller than many arrays."""
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).half().save_pretrained(folder)
        weights = (Path(folder) / "model.safetensors").read_bytes()
        return (Path(folder) / "config.json").read_text(), np.frombuffer(weights, np.uint8)


def before_5(config: str) -> str:
    """The same config in the words of transformers 4."""
    fields = json.loads(config)
    del fields["transformers_version"]
    fields["torch_dtype"] = fields.pop("dtype")
    if fields["model_type"] == "gpt2":  # nothing of it has changed
        return json.dumps(fields, indent=2)
    rope = fields.pop("rope_parameters")
    if "full_attention" in rope:
        fields["rope_local_base_freq"], rope = (
            rope["sliding_attention"]["rope_theta"],
            rope["full_attention"],
        )
        fields["sliding_window_pattern"] = fields.pop("_sliding_window_pattern")
    fields.pop("layer_types", None)
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    # transformers reads it as the same
    read = transformers.AutoConfig.for_model(**copy.deepcopy(fields)).to_dict()
    assert all(read[name] == value for name, value in json.loads(config).items() if name in read), (
        read
    )
    return json.dumps(fields, indent=2)


def call(
    model: PreTrainedModel, x: torch.Tensor, position: torch.Tensor, text: DynamicCache, length: int
):
    """Inputs x [S, D] at `position`, which see `length` tokens of the text and themselves.

    The library's own sliding mask counts slots of the cache; latents may share positions, so it is
    built here.
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
    return model(
        inputs_embeds=x[None],
        position_ids=position[None],
        past_key_values=cache,
        attention_mask=mask,
    )


def values(family: str) -> dict[str, np.ndarray]:
    """What the file of a family holds."""
    random = np.random.default_rng(0)
    decoder, coprocessor = new_model(family, random), new_model(family, random)
    coprocessor.get_input_embeddings().weight.zero_()  # it reads no tokens
    soft = torch.from_numpy(
        np.round(random.standard_normal((L, decoder.config.hidden_size)) * 64) / 64
    ).float()
    tokens = torch.from_numpy(random.integers(0, decoder.config.vocab_size, (B, T)))

    # Token embeddings are scaled inside the table's lookup, so latents enter as they are. Older
    # releases scale whatever comes in as inputs_embeds: this line refuses them.
    embed, read = decoder.get_input_embeddings(), decoder(tokens, output_hidden_states=True)
    torch.testing.assert_close(decoder(inputs_embeds=embed(tokens)).logits, read.logits)
    *layers, last = read.hidden_states[1:]  # of these only the last has been through the final norm
    body = decoder.base_model
    torch.testing.assert_close(
        decoder.lm_head(last), decoder.lm_head(body(tokens).last_hidden_state)
    )
    final_norm = body.ln_f if family == "gpt2" else body.norm
    hidden = torch.stack([*map(final_norm, layers), last])

    results: dict[str, list[torch.Tensor]] = {}
    for b, row in enumerate(tokens):
        text = DynamicCache()
        decoder(row[None], past_key_values=text)
        for p in POSITIONS[b]:
            ahead = row[p + 1 : p + 1 + A]

            def picked(logits: torch.Tensor, ahead=ahead) -> torch.Tensor:
                return logits[-A:].log_softmax(-1).gather(-1, ahead[:, None])[:, 0]

            results.setdefault("logprobs.decoder", []).append(picked(read.logits[b, : p + A]))
            # after: latents at p+1 ... p+L, then the ahead tokens. overlay: latents at p-L+1 ... p
            # instead of x_p's entry, then x_p and the ahead tokens, each where it stands in the
            # text.
            for placement, first, reread, shift in (
                ("after", p + 1, 0, L),
                ("overlay", p - L + 1, 1, 0),
            ):
                latent_position = (first + torch.arange(L)).clamp(min=0)
                z = call(
                    coprocessor.base_model, soft, latent_position, text, p + 1
                ).last_hidden_state[0]
                index = torch.arange(p + 1 - reread, p + A)
                position = torch.cat([latent_position, index + shift])
                x = torch.cat([z, embed(row[index])])
                logits = call(decoder, x, position, text, p + 1 - reread).logits[0]
                results.setdefault(f"latents.{placement}", []).append(z)
                results.setdefault(f"logprobs.{placement}", []).append(picked(logits))
    outputs = {"logits": read.logits, "hidden": hidden}
    outputs |= {name: torch.stack(value).unflatten(0, (B, -1)) for name, value in results.items()}

    config, weights = saved(decoder)
    return (
        {"config": np.array(config), "config_4": np.array(before_5(config))}
        | {"decoder": weights, "coprocessor": saved(coprocessor)[1], "soft_tokens": soft.numpy()}
        | {"tokens": tokens.numpy(), "positions": np.array(POSITIONS)}
        | {name: rounded(value.numpy()) for name, value in outputs.items()}
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        main(FAMILIES, values)
