"""Ours against `transformers`: logits, latents and log-probabilities that make_gemma2.py and make_llama.py stored."""

from pathlib import Path

import numpy as np
import pytest

import latent_delib as ld
from latent_delib.nn.sizes import TransformerConfig

TOLERANCE = 1e-4
# Family -> architecture, and the stored norm weight that leaves its input as it is.
FAMILIES = {
    "gemma2": (
        TransformerConfig(
            num_layers=4,
            embed_dim=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=48,
            vocab_size=97,
            head_dim=16,
            layer_pattern=("local", "global"),
            window=5,
            query_scale=0.2,
            attn_softcap=3.0,
            final_softcap=4.0,
            post_norms=True,
        ),
        0,
    ),
    "llama": (
        TransformerConfig(
            num_layers=3,
            embed_dim=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=48,
            vocab_size=97,
            activation="silu",
            rope_base=500.0,
            scale_embeddings=False,
            norm_eps=1e-5,
        ),
        1,
    ),
}


def our_tree(weights, model, config, norm):
    """The parameter tree of one stored model: theirs are [out, in], one a layer."""
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim

    def stacked(name, change):
        names = [f"{model}.layers.{i}.{name}.weight" for i in range(config.num_layers)]
        return np.stack([change(weights[n].astype(np.float32)) for n in names])

    def heads(name, count):
        return stacked(f"self_attn.{name}", lambda w: w.reshape(count, H, D).transpose(2, 0, 1))

    def scale(name):
        return {"scale": stacked(name, lambda w: w - norm)}

    layers = {
        "attn": {
            "q": heads("q_proj", N),
            "k": heads("k_proj", K),
            "v": heads("v_proj", K),
            "out": stacked("self_attn.o_proj", lambda w: w.T.reshape(N, H, D)),
        },
        "mlp": {name: stacked(f"mlp.{name}_proj", np.transpose) for name in ("gate", "up", "down")},
        "pre_attn_norm": scale("input_layernorm"),
    }
    if config.post_norms:
        layers["post_attn_norm"] = scale("post_attention_layernorm")
        layers["pre_mlp_norm"] = scale("pre_feedforward_layernorm")
        layers["post_mlp_norm"] = scale("post_feedforward_layernorm")
    else:
        layers["pre_mlp_norm"] = scale("post_attention_layernorm")
    return {"layers": layers, "final_norm": {"scale": weights[f"{model}.norm.weight"].astype(np.float32) - norm}}


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request):
    """Stored values, and the language model of a placement made of the stored weights."""
    config, norm = FAMILIES[request.param]
    with np.load(Path(__file__).with_name(f"{request.param}.npz"), allow_pickle=False) as file:
        stored = dict(file)
    embedding = stored["decoder.embed_tokens.weight"].astype(np.float32)
    decoder = our_tree(stored, "decoder", config, norm) | {"embedding": embedding}
    soft = stored["soft_tokens"].astype(np.float32)
    coprocessor = our_tree(stored, "coprocessor", config, norm) | {"soft_tokens": soft}

    def model(placement):
        ours = ld.Coprocessor(coprocessor, "cache_augmentation", len(soft), placement, "the same")
        return ld.AugmentedLM(ld.Decoder(config, decoder, None, "the same"), ours)

    return stored, model


def test_logits(golden):
    stored, model = golden
    np.testing.assert_allclose(model("after").logits(stored["tokens"]), stored["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_latents_and_what_they_do(golden, placement):
    stored, model = golden
    lm, where = model(placement), (stored["tokens"], stored["positions"])
    plain, augmented = lm.ahead_logprobs(*where, stored["logprobs.decoder"].shape[-1])
    for name, found in {
        f"latents.{placement}": lm.latents(*where),
        "logprobs.decoder": plain,
        f"logprobs.{placement}": augmented,
    }.items():
        np.testing.assert_allclose(found, stored[name], rtol=0, atol=TOLERANCE, err_msg=name)
