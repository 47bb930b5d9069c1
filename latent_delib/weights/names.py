"""Maps tensor names between our parameter tree and other formats.

There is one table per family, read in both directions. A row gives our leaf with its axes, and its
name in Hugging Face's, GGUF's and DeepMind's checkpoints, followed by the axes as stored (einops).
`[0/2]` picks a part of a tensor that fuses several leaves. Axes: V vocabulary, D width, N query
heads, K key/value heads, H head dim, F feed-forward width.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import einops
import numpy as np

from latent_delib.errors import UserError
from latent_delib.nn.sizes import TransformerConfig, family
from latent_delib.weights.tensors import check_shapes


class Row(NamedTuple):
    """Holds the names and axes of one leaf; DeepMind has published Gemma alone."""

    ours: str
    huggingface: str
    gguf: str
    deepmind: str = ""


# The names of a layer's tensors begin with these; `{}` is its number.
LAYER = {"huggingface": "model.layers.{}.", "gguf": "blk.{}.", "deepmind": "layer_{}/"}

_OUTSIDE = {
    "embedding": Row(
        "V D",
        "model.embed_tokens.weight V D",
        "token_embd.weight V D",
        "embedder/input_embedding V D",
    ),
    "final_norm.scale": Row(
        "D", "model.norm.weight D", "output_norm.weight D", "final_norm/scale D"
    ),
}
_LLAMA = {
    "pre_attn_norm.scale": Row(
        "D", "input_layernorm.weight D", "attn_norm.weight D", "pre_attention_norm/scale D"
    ),
    "attn.q": Row(
        "D N H", "self_attn.q_proj.weight (N H) D", "attn_q.weight (N H) D", "attn/q_einsum N D H"
    ),
    "attn.k": Row(
        "D K H",
        "self_attn.k_proj.weight (K H) D",
        "attn_k.weight (K H) D",
        "attn/kv_einsum[0/2] K D H",
    ),
    "attn.v": Row(
        "D K H",
        "self_attn.v_proj.weight (K H) D",
        "attn_v.weight (K H) D",
        "attn/kv_einsum[1/2] K D H",
    ),
    "attn.out": Row(
        "N H D",
        "self_attn.o_proj.weight D (N H)",
        "attn_output.weight D (N H)",
        "attn/attn_vec_einsum N H D",
    ),
    "pre_mlp_norm.scale": Row(
        "D", "post_attention_layernorm.weight D", "ffn_norm.weight D", "pre_ffw_norm/scale D"
    ),
    "mlp.gate": Row(
        "D F", "mlp.gate_proj.weight F D", "ffn_gate.weight F D", "mlp/gating_einsum[0/2] D F"
    ),
    "mlp.up": Row(
        "D F", "mlp.up_proj.weight F D", "ffn_up.weight F D", "mlp/gating_einsum[1/2] D F"
    ),
    "mlp.down": Row("F D", "mlp.down_proj.weight D F", "ffn_down.weight D F", "mlp/linear F D"),
}
_QK_NORMS = {
    "attn.q_norm.scale": Row(
        "H", "self_attn.q_norm.weight H", "attn_q_norm.weight H", "attn/_query_norm/scale H"
    ),
    "attn.k_norm.scale": Row(
        "H", "self_attn.k_norm.weight H", "attn_k_norm.weight H", "attn/_key_norm/scale H"
    ),
}
# Llama's post_attention_layernorm stands before the MLP; here it is after the attention.
_POST_NORMS = {
    "post_attn_norm.scale": Row(
        "D",
        "post_attention_layernorm.weight D",
        "post_attention_norm.weight D",
        "post_attention_norm/scale D",
    ),
    "pre_mlp_norm.scale": Row(
        "D", "pre_feedforward_layernorm.weight D", "ffn_norm.weight D", "pre_ffw_norm/scale D"
    ),
    "post_mlp_norm.scale": Row(
        "D",
        "post_feedforward_layernorm.weight D",
        "post_ffw_norm.weight D",
        "post_ffw_norm/scale D",
    ),
}
_QKV_BIASES = {
    "attn.q_bias": Row("N H", "self_attn.q_proj.bias (N H)", "attn_q.bias (N H)"),
    "attn.k_bias": Row("K H", "self_attn.k_proj.bias (K H)", "attn_k.bias (K H)"),
    "attn.v_bias": Row("K H", "self_attn.v_proj.bias (K H)", "attn_v.bias (K H)"),
}
_HEAD = Row("V D", "lm_head.weight V D", "output.weight V D")
LAYER_ROWS = {
    "llama": _LLAMA,
    "qwen2": _LLAMA | _QKV_BIASES,
    "qwen3": _LLAMA | _QK_NORMS,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _POST_NORMS,
    "gemma3": _LLAMA | _POST_NORMS | _QK_NORMS,
}


def rows(config: TransformerConfig) -> dict[str, Row]:
    """Returns the rows of an architecture's leaves, by leaf."""
    found = dict(_OUTSIDE)
    for leaf, row in LAYER_ROWS[family(config)].items():
        found[f"layers.{leaf}"] = row
    if config.untied_head:
        found["head"] = _HEAD
    return found


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Says how one leaf of ours, or one layer of it, is stored in another format.

    leaf, layer: ours; no layer for leaves that are not stacked. name, shape: of the stored tensor,
    or of the part of it that is this leaf. part: (index, of how many) on a leading axis, or None.
    theirs, ours: axes in both formats. sizes: of the axes. added: what stored norms hold beyond
    ours.
    """

    leaf: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    part: tuple[int, int] | None
    theirs: str
    ours: str
    sizes: Mapping[str, int]
    added: float

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Returns the shape of the whole stored tensor."""
        return self.shape if self.part is None else (self.part[1], *self.shape)

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Returns a stored tensor as our leaf, in its dtype."""
        if self.part is not None:
            x = x[self.part[0]]
        x = einops.rearrange(x, f"{self.theirs} -> {self.ours}", **self._sizes(self.theirs))
        return x - x.dtype.type(self.added) if self.added else x

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """Returns our leaf as the tensor to store; fused ones are never written."""
        return einops.rearrange(x, f"{self.ours} -> {self.theirs}", **self._sizes(self.ours))

    def _sizes(self, axes: str) -> dict[str, int]:
        """Returns the sizes of the axes in brackets, which einops cannot find by itself."""
        inside = " ".join(re.findall(r"\(([^)]*)\)", axes)).split()
        return {axis: self.sizes[axis] for axis in inside}


def tensors(config: TransformerConfig, form: str) -> Iterator[Tensor]:
    """Yields every tensor of a decoder in the order of our leaves, layers one after the other.

    Args:
      config: the architecture.
      form: a column of the tables: "huggingface", "gguf" or "deepmind".
    """
    c = config
    sizes = dict(
        V=c.vocab_size, D=c.embed_dim, N=c.num_heads, K=c.num_kv_heads, H=c.head_dim, F=c.ffn_dim
    )
    sizes |= dict(h=c.head_dim // 2, c=2)
    has_pairs = form == "gguf" and family(c) == "llama"
    is_fused = form == "deepmind" and c.num_heads == c.num_kv_heads
    for leaf, row in rows(c).items():
        name, _, theirs = getattr(row, form).partition(" ")
        ours = row.ours
        if has_pairs and leaf in ("layers.attn.q", "layers.attn.k"):
            # There rotary pairs are neighbours, (0, 1), (2, 3), ...; elsewhere halves of a head.
            theirs, ours = theirs.replace("H", "h c"), ours.replace("H", "(c h)")
        if is_fused and re.fullmatch(r"layers\.attn\.[qkv]", leaf):
            name = f"attn/qkv_einsum[{'qkv'.index(leaf[-1])}/3]"
        part = re.fullmatch(r"(.*)\[(\d)/(\d)\]", name)
        groups = re.findall(r"\([^)]*\)|\w", theirs)
        shape = []
        for group in groups:
            shape.append(math.prod(sizes[axis] for axis in group.strip("()").split()))
        tensor = Tensor(
            leaf=leaf,
            layer=None,
            name=part[1] if part else name,
            shape=tuple(shape),
            part=(int(part[2]), int(part[3])) if part else None,
            theirs=theirs,
            ours=ours,
            sizes=sizes,
            added=c.norm_offset if form == "gguf" and leaf.endswith(".scale") else 0.0,
        )
        if not leaf.startswith("layers."):
            yield tensor
            continue
        for layer in range(c.num_layers):
            name = LAYER[form].format(layer) + tensor.name
            yield dataclasses.replace(tensor, layer=layer, name=name)


def match(
    found: Mapping[str, tuple[int, ...]],
    config: TransformerConfig,
    form: str,
    source: str,
    without: tuple[str, ...] = (),
) -> list[Tensor]:
    """Returns the tensors of a checkpoint.

    Args:
      found: name -> shape of all that it holds.
      config: its architecture.
      form: a column of the tables.
      source: its path, for messages.
      without: leaves that it does not have.

    Raises:
      UserError: tensors are missing, unknown or misshapen; all are listed, by their name and by
        ours.
    """
    if config.num_layers > len(found):  # a damaged number must not make a billion names
        raise UserError(f"{source}: {config.num_layers} layers, but only {len(found)} tensors")
    wanted = [t for t in tensors(config, form) if t.leaf not in without]
    shapes: dict[str, tuple[int, ...]] = {}
    ours: dict[str, str] = {}
    for t in wanted:
        shapes[t.name] = t.stored_shape
        layer = "" if t.layer is None else f" of layer {t.layer}"
        ours[t.name] = f" ({t.leaf}{layer})"
    check_shapes(found, shapes, source, ours)
    return wanted
