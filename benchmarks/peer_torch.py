"""Holds the peer's model: Gemma 2 and its likes as a PyTorch user would write them.

`peer_steps` trains it. Layers are in the manner of `transformers`. Visibility is that of Liu et al.
2025, Figure 2, by mask functions.

On a GPU, attention is torch's flex_attention with a block mask, and the softcap is its score
modification. On a CPU it has no backward pass, and torch's other fused attention has no softcap.
There attention is plain tensor operations over the pairs that the same mask functions may show: a
trace's tokens with the text and with each other.

Letters as in the package. X counts the tokens of a trace. Traces stand one after the other: S = M X
counts those of a row together, and U the keys that they see, the text's T first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from latent_delib.nn.sizes import TransformerConfig

Pair = tuple[Tensor, Tensor]  # keys and values


class Traces(NamedTuple):
    """Holds the traces of a batch.

    latent_position: of latents [B, M, L]. position: of latents and inputs [B, M, X].
    start: the first text token seen [B, M]. latent_stop, stop: past the last one, for latents and
    for tokens [B, M]. inputs: [B, M, X - L]. targets, weights: [B, M, A].
    """

    latent_position: Tensor
    position: Tensor
    start: Tensor
    latent_stop: Tensor
    stop: Tensor
    inputs: Tensor
    targets: Tensor
    weights: Tensor


def document_start(segment_BT: Tensor) -> Tensor:
    """Returns the index of the first token of each token's document, [B, T]."""
    index = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    first = torch.ones_like(segment_BT, dtype=torch.bool)
    first[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def draw(segment_BT: Tensor, num_traces: int) -> Tensor:
    """Draws distinct sorted positions that have an ahead token, [B, M].

    Where they run out it is T - 1, which has none.
    """
    usable = (segment_BT[:, :-1] == segment_BT[:, 1:]) & (segment_BT[:, 1:] > 0)
    noise = torch.rand(usable.shape, device=segment_BT.device).masked_fill(~usable, -1)
    score, at = noise.topk(num_traces)
    return at.masked_fill(score < 0, segment_BT.shape[1] - 1).sort(dim=1).values


def lay_out(
    tokens_BT: Tensor,
    segment_BT: Tensor,
    at_BM: Tensor,
    num_latents: int,
    num_ahead: int,
    placement: str,
) -> Traces:
    """Returns the traces at text tokens `at_BM`, placed "after" or "overlay"."""
    T, device = tokens_BT.shape[1], tokens_BT.device

    def take(row_BT: Tensor, index_BMX: Tensor) -> Tensor:
        return row_BT.gather(1, index_BMX.clamp(0, T - 1).flatten(1)).view(index_BMX.shape)

    at = at_BM[..., None]
    start = take(document_start(segment_BT), at)
    overlay = placement == "overlay"
    latent = torch.arange(num_latents, device=device) + (1 - num_latents if overlay else 1)
    latent_position = (at - start + latent).clamp(min=0)
    offset = torch.arange(0 if overlay else 1, num_ahead, device=device)
    ahead = at + torch.arange(1, num_ahead + 1, device=device)
    segment = take(segment_BT, at)
    inside = (ahead < T) & (take(segment_BT, ahead) == segment) & (segment > 0)
    input_position = at - start + offset + (0 if overlay else num_latents)
    return Traces(
        latent_position=latent_position,
        position=torch.cat([latent_position, input_position], dim=-1),
        start=start[..., 0],
        latent_stop=at_BM + 1,
        stop=at_BM + (0 if overlay else 1),
        inputs=take(tokens_BT, at + offset),
        targets=take(tokens_BT, ahead),
        weights=inside.float(),
    )


def text_mask(position_BT: Tensor, start_BT: Tensor, window: int | None) -> Callable:
    """Shows a token its own document, causally."""

    def sees(b, h, q, kv):
        seen = (kv >= start_BT[b, q]) & (kv <= q)
        return seen if window is None else seen & (position_BT[b, q] - position_BT[b, kv] < window)

    return sees


def trace_mask(
    position_BMX: Tensor,
    start_BM: Tensor,
    stop_BM: Tensor,
    text_position_BT: Tensor,
    window: int | None,
) -> Callable:
    """Shows a token the text tokens start <= t < stop, and its own trace causally."""
    T, X = text_position_BT.shape[1], position_BMX.shape[2]
    position_BU = torch.cat([text_position_BT, position_BMX.flatten(1)], dim=1)

    def sees(b, h, q, kv):
        text = (kv >= start_BM[b, q // X]) & (kv < stop_BM[b, q // X])
        own = (kv >= T) & ((kv - T) // X == q // X) & (kv - T <= q)
        seen = text | own
        if window is None:
            return seen
        return seen & (position_BU[b, T + q] - position_BU[b, kv] < window)

    return sees


def blocks(
    sees: Callable, batch: int, traces: int, size: int, text: int, device: torch.device
) -> BlockMask:
    """Returns the mask of `flex`, of traces of `size` tokens over a text, by a mask function."""
    queries = traces * size
    return create_block_mask(sees, batch, None, queries, text + queries, device=device)


def softcapped(
    score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *, softcap: float
) -> Tensor:
    return softcap * torch.tanh(score / softcap)


def flex(
    q: Tensor, own: Pair, cached: Pair | None, mask: BlockMask, scale: float, softcap: float
) -> Tensor:
    """Computes attention by flex_attention, [B, N, S, H].

    q [B, N, S, H]; own: keys and values [B, K, S, H] each; cached: the text's, [B, K, T, H].
    """
    k, v = own
    if cached is not None:
        k, v = torch.cat([cached[0], k], dim=2), torch.cat([cached[1], v], dim=2)
    capped = partial(softcapped, softcap=softcap) if softcap else None
    return flex_attention(q, k, v, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=True)


def pairs(
    sees: Callable, batch: int, traces: int, size: int, text: int, device: torch.device
) -> Tensor:
    """Returns the mask of `plain`, over the text and the own trace: bool [B, 1, 1, M, X, T + X]."""
    first = size * torch.arange(traces, device=device)[:, None, None]
    inside = torch.arange(size, device=device)
    of_text = torch.arange(text, device=device).expand(traces, 1, text)
    keys = torch.cat([of_text, text + first + inside], dim=-1)
    rows = torch.arange(batch, device=device)[:, None, None, None]
    return sees(rows, None, first + inside[:, None], keys)[:, None, None]


def plain(
    q: Tensor, own: Pair, cached: Pair | None, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Computes the same by tensor operations; no trace is multiplied with another."""
    B, N, S, H = q.shape
    K, M, X = own[0].shape[1], mask.shape[3], mask.shape[4]
    q = q.view(B, K, N // K, M, X, H)
    k, v = (x.view(B, K, M, X, H) for x in own)
    score = torch.einsum("bkgmxh,bkmyh->bkgmxy", q, k)
    if cached is not None:
        score = torch.cat([torch.einsum("bkgmxh,bkth->bkgmxt", q, cached[0]), score], dim=-1)
    score = score * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    weight = score.masked_fill(~mask, -torch.inf).softmax(-1)
    out = torch.einsum("bkgmxy,bkmyh->bkgmxh", weight[..., -X:], v)
    if cached is not None:
        out = out + torch.einsum("bkgmxt,bkth->bkgmxh", weight[..., :-X], cached[1])
    return out.reshape(B, N, S, H)


class Form(NamedTuple):
    """Holds a form of attention, and the function that makes its mask."""

    attend: Callable
    mask: Callable


FORMS = {"cuda": Form(flex, blocks), "cpu": Form(plain, pairs)}  # by device


class RMSNorm(nn.Module):
    def __init__(self, width: int, c: TransformerConfig):
        super().__init__()
        self.eps, self.offset = c.norm_eps, c.norm_offset
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (self.offset + self.weight.float())).type_as(x)


def rotary(position_BS: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, float32 [B, 1, S, H]."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BS.device) / head_dim)
    angle = (position_BS[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, c: TransformerConfig, attend: Callable):
        super().__init__()
        self.c, self.attend = c, attend
        self.q_proj = nn.Linear(c.embed_dim, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.embed_dim, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.embed_dim, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.embed_dim, bias=False)

    def forward(self, x_BSD, rope, mask, cached):
        c = self.c
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x_BSD).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(q, rope), rotate(k, rope)
        out = self.attend(q, (k, v), cached, mask, c.query_scale, c.attn_softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.embed_dim, c.ffn_dim, bias=False)
        self.up_proj = nn.Linear(c.embed_dim, c.ffn_dim, bias=False)
        self.down_proj = nn.Linear(c.ffn_dim, c.embed_dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: TransformerConfig, attend: Callable):
        super().__init__()
        self.attn, self.mlp = Attention(c, attend), MLP(c)
        self.pre_attn_norm, self.post_attn_norm = RMSNorm(c.embed_dim, c), RMSNorm(c.embed_dim, c)
        self.pre_mlp_norm, self.post_mlp_norm = RMSNorm(c.embed_dim, c), RMSNorm(c.embed_dim, c)

    def forward(self, x_BSD, rope, mask, cached):
        y, kv = self.attn(self.pre_attn_norm(x_BSD), rope, mask, cached)
        x_BSD = x_BSD + self.post_attn_norm(y)
        return x_BSD + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x_BSD))), kv


class Model(nn.Module):
    """Stacks layers over embeddings: a decoder has a table of tokens, a coprocessor soft tokens.

    attend: `flex` or `plain`.
    """

    def __init__(self, c: TransformerConfig, attend: Callable, num_soft: int = 0):
        super().__init__()
        is_gemma2 = c.post_norms and not c.qk_norm and not c.rope_scaling
        assert is_gemma2 and c.activation == "gelu", "a Gemma 2"
        self.c = c
        self.layers = nn.ModuleList(Layer(c, attend) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.embed_dim, c)
        table = torch.randn(num_soft or c.vocab_size, c.embed_dim) * c.embed_dim**-0.5
        self.register_parameter("soft_tokens" if num_soft else "embedding", nn.Parameter(table))

    def embed(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding)
        if self.c.scale_embeddings:
            x = x * torch.tensor(self.c.embed_dim**0.5, dtype=x.dtype)
        return x

    def forward(self, x_BSD, position_BS, masks, caches=None, checkpointed=False):
        """Returns final-normed outputs, and every layer's keys and values.

        masks: of global layers, and of local ones.
        """
        c, kvs = self.c, []
        ropes = [rotary(position_BS, c.head_dim, base) for base in (c.rope_base, c.local_rope_base)]
        for i, (layer, local) in enumerate(zip(self.layers, c.is_local)):
            call = partial(checkpoint, layer, use_reentrant=False) if checkpointed else layer
            cached = None if caches is None else caches[i]
            x_BSD, kv = call(x_BSD, ropes[local], masks[local], cached)
            kvs.append(kv)
        return self.norm(x_BSD), kvs


def wait(_: Any = None) -> None:
    """Waits until the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def token_nll(x_RD: Tensor, embedding_VD: Tensor, target_R: Tensor, softcap: float) -> Tensor:
    """Returns -log p(target) of a chunk of rows, float32 [R]."""
    logits = (x_RD @ embedding_VD.T).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target_R, reduction="none")


def load(model: Model, tree: dict[str, Any]) -> None:
    """Loads a parameter tree of ours: layers on the first axis, heads on an axis of their own."""
    layers, state = tree["layers"], {"norm.weight": tree["final_norm"]["scale"]}
    for name in ("embedding", "soft_tokens"):
        if name in tree:
            state[name] = tree[name]
    width = model.c.embed_dim
    for i in range(model.c.num_layers):
        for name in ("q", "k", "v"):
            weight = layers["attn"][name][i].reshape(width, -1)
            state[f"layers.{i}.attn.{name}_proj.weight"] = weight.T
        weight = layers["attn"]["out"][i].reshape(-1, width)
        state[f"layers.{i}.attn.o_proj.weight"] = weight.T
        for name in ("gate", "up", "down"):
            state[f"layers.{i}.mlp.{name}_proj.weight"] = layers["mlp"][name][i].T
        for name in ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm"):
            state[f"layers.{i}.{name}.weight"] = layers[name]["scale"][i]
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    model.load_state_dict(tensors)
