"""Maps tensor names between our parameter tree and other formats.

Each family has one table, which is read in both directions. A row gives the axes of our leaf, and
then its name in Hugging Face's, GGUF's and DeepMind's checkpoints, each followed by the axes as
stored (einops). `[0/2]` after a name means part 0 of 2 of a tensor that fuses several leaves along
its axis i. Axes: V vocabulary, D width, N query heads, K key/value heads, H head dim, F
feed-forward width, P learned positions.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import einops
import numpy as np

from latent_delib.errors import UserError
from latent_delib.nn.sizes import TransformerConfig, family
from latent_delib.weights.tensors import check_shapes


class Names(NamedTuple):
    """Holds the axes of one leaf, and its name and axes in each form.

    deepmind: "" for leaves that Gemma does not have: DeepMind has published Gemma alone.
    """

    ours: str
    huggingface: str
    gguf: str
    deepmind: str = ""


# The names of a layer's tensors begin with these; `{}` is the layer's number.
LAYER = {"huggingface": "model.layers.{}.", "gguf": "blk.{}.", "deepmind": "layer_{}/"}
GPT2_LAYER = LAYER | {"huggingface": "transformer.h.{}."}

_OUTSIDE = {
    "embedding": Names(
        "V D",
        "model.embed_tokens.weight V D",
        "token_embd.weight V D",
        "embedder/input_embedding V D",
    ),
    "final_norm.scale": Names(
        "D", "model.norm.weight D", "output_norm.weight D", "final_norm/scale D"
    ),
}
_LLAMA = {
    "pre_attn_norm.scale": Names(
        "D", "input_layernorm.weight D", "attn_norm.weight D", "pre_attention_norm/scale D"
    ),
    "attn.q": Names(
        "D N H", "self_attn.q_proj.weight (N H) D", "attn_q.weight (N H) D", "attn/q_einsum N D H"
    ),
    "attn.k": Names(
        "D K H",
        "self_attn.k_proj.weight (K H) D",
        "attn_k.weight (K H) D",
        "attn/kv_einsum[0/2] i K D H",
    ),
    "attn.v": Names(
        "D K H",
        "self_attn.v_proj.weight (K H) D",
        "attn_v.weight (K H) D",
        "attn/kv_einsum[1/2] i K D H",
    ),
    "attn.out": Names(
        "N H D",
        "self_attn.o_proj.weight D (N H)",
        "attn_output.weight D (N H)",
        "attn/attn_vec_einsum N H D",
    ),
    "pre_mlp_norm.scale": Names(
        "D", "post_attention_layernorm.weight D", "ffn_norm.weight D", "pre_ffw_norm/scale D"
    ),
    "mlp.gate": Names(
        "D F", "mlp.gate_proj.weight F D", "ffn_gate.weight F D", "mlp/gating_einsum[0/2] i D F"
    ),
    "mlp.up": Names(
        "D F", "mlp.up_proj.weight F D", "ffn_up.weight F D", "mlp/gating_einsum[1/2] i D F"
    ),
    "mlp.down": Names("F D", "mlp.down_proj.weight D F", "ffn_down.weight D F", "mlp/linear F D"),
}
_QK_NORMS = {
    "attn.q_norm.scale": Names(
        "H", "self_attn.q_norm.weight H", "attn_q_norm.weight H", "attn/_query_norm/scale H"
    ),
    "attn.k_norm.scale": Names(
        "H", "self_attn.k_norm.weight H", "attn_k_norm.weight H", "attn/_key_norm/scale H"
    ),
}
# Hugging Face's post_attention_layernorm is the norm before the MLP in Llama, but after the
# attention here.
_POST_NORMS = {
    "post_attn_norm.scale": Names(
        "D",
        "post_attention_layernorm.weight D",
        "post_attention_norm.weight D",
        "post_attention_norm/scale D",
    ),
    "pre_mlp_norm.scale": Names(
        "D", "pre_feedforward_layernorm.weight D", "ffn_norm.weight D", "pre_ffw_norm/scale D"
    ),
    "post_mlp_norm.scale": Names(
        "D",
        "post_feedforward_layernorm.weight D",
        "post_ffw_norm.weight D",
        "post_ffw_norm/scale D",
    ),
}
_QKV_BIASES = {
    "attn.q_bias": Names("N H", "self_attn.q_proj.bias (N H)", "attn_q.bias (N H)"),
    "attn.k_bias": Names("K H", "self_attn.k_proj.bias (K H)", "attn_k.bias (K H)"),
    "attn.v_bias": Names("K H", "self_attn.v_proj.bias (K H)", "attn_v.bias (K H)"),
}
_HEAD = Names("V D", "lm_head.weight V D", "output.weight V D")
_GPT2_OUTSIDE = {
    "embedding": Names("V D", "transformer.wte.weight V D", "token_embd.weight V D"),
    "positions": Names("P D", "transformer.wpe.weight P D", "position_embd.weight P D"),
    "final_norm.scale": Names("D", "transformer.ln_f.weight D", "output_norm.weight D"),
    "final_norm.bias": Names("D", "transformer.ln_f.bias D", "output_norm.bias D"),
}
_GPT2 = {
    "pre_attn_norm.scale": Names("D", "ln_1.weight D", "attn_norm.weight D"),
    "pre_attn_norm.bias": Names("D", "ln_1.bias D", "attn_norm.bias D"),
    "attn.q": Names("D N H", "attn.c_attn.weight[0/3] D (i N H)", "attn_qkv.weight[0/3] (i N H) D"),
    "attn.k": Names("D N H", "attn.c_attn.weight[1/3] D (i N H)", "attn_qkv.weight[1/3] (i N H) D"),
    "attn.v": Names("D N H", "attn.c_attn.weight[2/3] D (i N H)", "attn_qkv.weight[2/3] (i N H) D"),
    "attn.q_bias": Names("N H", "attn.c_attn.bias[0/3] (i N H)", "attn_qkv.bias[0/3] (i N H)"),
    "attn.k_bias": Names("N H", "attn.c_attn.bias[1/3] (i N H)", "attn_qkv.bias[1/3] (i N H)"),
    "attn.v_bias": Names("N H", "attn.c_attn.bias[2/3] (i N H)", "attn_qkv.bias[2/3] (i N H)"),
    "attn.out": Names("N H D", "attn.c_proj.weight (N H) D", "attn_output.weight D (N H)"),
    "attn.out_bias": Names("D", "attn.c_proj.bias D", "attn_output.bias D"),
    "pre_mlp_norm.scale": Names("D", "ln_2.weight D", "ffn_norm.weight D"),
    "pre_mlp_norm.bias": Names("D", "ln_2.bias D", "ffn_norm.bias D"),
    "mlp.up": Names("D F", "mlp.c_fc.weight D F", "ffn_up.weight F D"),
    "mlp.up_bias": Names("F", "mlp.c_fc.bias F", "ffn_up.bias F"),
    "mlp.down": Names("F D", "mlp.c_proj.weight F D", "ffn_down.weight D F"),
    "mlp.down_bias": Names("D", "mlp.c_proj.bias D", "ffn_down.bias D"),
}
LAYER_ROWS = {
    "llama": _LLAMA,
    "qwen2": _LLAMA | _QKV_BIASES,
    "qwen3": _LLAMA | _QK_NORMS,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _POST_NORMS,
    "gemma3": _LLAMA | _POST_NORMS | _QK_NORMS,
    "gpt2": _GPT2,
}


def rows(config: TransformerConfig) -> dict[str, Names]:
    """Returns leaf -> row, for all leaves of an architecture."""
    ours = family(config)
    found = dict(_GPT2_OUTSIDE if ours == "gpt2" else _OUTSIDE)
    for leaf, row in LAYER_ROWS[ours].items():
        found[f"layers.{leaf}"] = row
    if config.untied_head:
        found["head"] = _HEAD
    return found


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Says how one leaf of ours, or one layer of it, is stored in another form.

    leaf: our name of the leaf.
    layer: number of the layer; None for leaves that are not stacked.
    name, shape: name and shape of the stored tensor.
    part: index of this leaf on axis i of the stored tensor; None where the tensor is one leaf.
    stored_axes, leaf_axes: the axes of the stored tensor and of our leaf.
    sizes: axis -> size.
    added: what the other form adds to each norm scale: GGUF stores Gemma's as 1 + scale.
    """

    leaf: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    part: int | None
    stored_axes: str
    leaf_axes: str
    sizes: Mapping[str, int]
    added: float

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """Returns a stored tensor as our leaf, in its dtype."""
        wanted = self.leaf_axes if self.part is None else f"i {self.leaf_axes}"
        x = self._rearranged(x, self.stored_axes, wanted)
        if self.part is not None:
            x = x[self.part]
        return x - x.dtype.type(self.added) if self.added else x

    def to_theirs(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the tensor to store, made from this leaf or from all that it fuses, in order."""
        if self.part is None:
            return self._rearranged(leaves[0], self.leaf_axes, self.stored_axes)
        return self._rearranged(np.stack(leaves), f"i {self.leaf_axes}", self.stored_axes)

    def _rearranged(self, x: np.ndarray, before: str, after: str) -> np.ndarray:
        # einops must be told the sizes of the axes in brackets.
        inside = " ".join(re.findall(r"\(([^)]*)\)", before)).split()
        sizes = {axis: self.sizes[axis] for axis in inside}
        return einops.rearrange(x, f"{before} -> {after}", **sizes)


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
    sizes |= dict(P=c.learned_positions, h=c.head_dim // 2, c=2)
    prefixes = GPT2_LAYER if family(c) == "gpt2" else LAYER
    for leaf, names in rows(c).items():
        stored_name, stored_axes, leaf_axes = _columns(c, form, leaf, names)
        in_one = re.fullmatch(r"(.*)\[(\d)/(\d)\]", stored_name)
        own_sizes = sizes | {"i": int(in_one[3])} if in_one else sizes
        groups = re.findall(r"\([^)]*\)|\w", stored_axes)
        shape = []
        for group in groups:
            shape.append(math.prod(own_sizes[axis] for axis in group.strip("()").split()))
        tensor = Tensor(
            leaf=leaf,
            layer=None,
            name=in_one[1] if in_one else stored_name,
            shape=tuple(shape),
            part=int(in_one[2]) if in_one else None,
            stored_axes=stored_axes,
            leaf_axes=leaf_axes,
            sizes=own_sizes,
            added=c.norm_offset if form == "gguf" and leaf.endswith(".scale") else 0.0,
        )
        if not leaf.startswith("layers."):
            yield tensor
            continue
        for layer in range(c.num_layers):
            name = prefixes[form].format(layer) + tensor.name
            yield dataclasses.replace(tensor, layer=layer, name=name)


def _columns(c: TransformerConfig, form: str, leaf: str, names: Names) -> tuple[str, str, str]:
    """Returns a leaf's name in a form, the axes that it has there, and those that it has here."""
    name, _, axes = getattr(names, form).partition(" ")
    if form == "gguf" and family(c) == "llama" and leaf in ("layers.attn.q", "layers.attn.k"):
        # GGUF's Llama has rotary pairs as neighbours, (0, 1), (2, 3), ...: H is h pairs of c = 2
        # there. Others have them as two halves of a head: H is c halves of h.
        return name, axes.replace("H", "h c"), names.ours.replace("H", "(c h)")
    is_qkv = re.fullmatch(r"layers\.attn\.[qkv]", leaf)
    if form == "deepmind" and is_qkv and c.num_heads == c.num_kv_heads:  # fused in one tensor
        name = f"attn/qkv_einsum[{'qkv'.index(leaf[-1])}/3]"
        return name, f"i {axes.removeprefix('i ')}", names.ours
    return name, axes, names.ours


def fused(found: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Returns stored name -> tensors: one, or the parts of a fused tensor in order."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in found:
        groups.setdefault(tensor.name, []).append(tensor)
    return groups


def match(
    found: Mapping[str, tuple[int, ...]],
    config: TransformerConfig,
    form: str,
    source: str,
    without: tuple[str, ...] = (),
) -> list[Tensor]:
    """Returns the tensors of a checkpoint.

    Args:
      found: name -> shape of every tensor in the checkpoint.
      config: its architecture.
      form: a column of the tables.
      source: its path, for messages.
      without: leaves that the checkpoint does not have.

    Raises:
      UserError: tensors are missing, unknown or of a wrong shape. All are listed, by their stored
        name and by ours.
    """
    if config.num_layers > len(found):  # a damaged number must not make a billion names
        raise UserError(f"{source}: {config.num_layers} layers, but only {len(found)} tensors")
    wanted = [t for t in tensors(config, form) if t.leaf not in without]
    shapes: dict[str, tuple[int, ...]] = {}
    ours: dict[str, str] = {}
    for t in wanted:
        shapes[t.name] = t.shape
        layer = "" if t.layer is None else f" of layer {t.layer}"
        ours[t.name] = f" ({t.leaf}{layer})"
    check_shapes(found, shapes, source, ours)
    return wanted
