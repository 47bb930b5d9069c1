"""Writes deepmind_gemma.npz ...: what small models compute in DeepMind's own `gemma`.

  python tests/golden/make_deepmind.py            writes tests/golden/deepmind_FAMILY.npz
  python tests/golden/make_deepmind.py --check    computes them again and compares

Nothing of latent_delib is imported. Made with gemma 3.3.0, kauldron 1.3.0, jax 0.10.1 and flax
0.12.8 in an environment of its own: jax 0.10.2 and typeguard 4.6 are too new for them. Much of what
the two require is never imported, so

  pip install --no-deps gemma==3.3.0 kauldron==1.3.0 pip install jax==0.10.1 flax einops
  etils[edc,enp,epath,epy,etree] orbax-checkpoint sentencepiece treescope jaxtyping pip install
  grain clu tensorflow tensorflow-datasets tensorboard lark typeguard==4.4.4 immutabledict chex
  pandas pip install ml_collections mediapy safetensors

A file holds "params", the bytes of a safetensors file with the leaves of the tree under the names
of their published checkpoints ("transformer/layer_0/attn/q_einsum" holds {"w": ...}, here
"transformer/layer_0/attn/q_einsum/w"), and tokens [B, T] and logits [B, T, V].
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from gemma.gm.ckpts import _compat
from gemma.gm.nn import AttentionType
from gemma.gm.nn import config as gm_config
from safetensors.numpy import save
from stored import main, rounded

B, T = 2, 24  # prompts and their tokens
LOCAL, GLOBAL = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL
NORMED = dict(use_post_attn_norm=True, use_post_ffw_norm=True, sliding_window_size=5)
# Family -> (N, K, F) and what else its config says. Where N = K, one tensor holds queries, keys and
# values.
FAMILIES = {
    "gemma": ((3, 3, 32), dict(attention_types=(GLOBAL,) * 2)),
    "gemma2": (
        (4, 2, 32),
        dict(
            attention_types=(LOCAL, GLOBAL) * 2 + (LOCAL,),
            query_pre_attn_norm=gm_config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
            attn_logits_soft_cap=3.0,
            final_logit_softcap=4.0,
        )
        | NORMED,
    ),
    "gemma3": (
        (2, 1, 32),
        dict(
            attention_types=(*[LOCAL] * 5, GLOBAL, LOCAL),
            use_qk_norm=True,
            transpose_gating_einsum=True,
            local_base_frequency=100,
            global_base_frequency=5000,
            global_scale_factor=4.0,
        )
        | NORMED,
    ),
}


def values(name: str) -> dict[str, np.ndarray]:
    """What the file holds."""
    (N, K, F), others = FAMILIES[name.removeprefix("deepmind_")]
    plain = dict(final_logit_softcap=None, use_post_attn_norm=False, use_post_ffw_norm=False)
    config = gm_config.TransformerConfig(
        num_embed=320,
        embed_dim=24,
        hidden_dim=F,
        num_heads=N,
        num_kv_heads=K,
        head_dim=8,
        **(plain | others),
    )
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    random = np.random.default_rng(0)
    # a 0 would be taken for padding
    tokens = random.integers(1, config.num_embed, (B, T), np.int32)

    def at_random(path, x: jax.ShapeDtypeStruct) -> np.ndarray:
        """Multiples of 1/64, which float16 holds; norms scatter too."""
        width = 0.3 if path[-1].key == "scale" else 1.5 * 24**-0.5
        return np.float32(np.round(random.standard_normal(x.shape) * width * 64) / 64)

    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map_with_path(at_random, shapes)
    logits = model.apply({"params": params}, tokens).logits
    published = {
        f"transformer/{name}": leaves
        for name, leaves in _compat.flatten_and_remap_params(params).items()
    }
    leaves = {
        name: np.float16(x)
        for name, x in flax.traverse_util.flatten_dict(published, sep="/").items()
    }
    return {
        "params": np.frombuffer(save(leaves), np.uint8),
        "tokens": tokens,
        "logits": rounded(np.asarray(logits)),
    }


if __name__ == "__main__":
    main([f"deepmind_{family}" for family in FAMILIES], values)
