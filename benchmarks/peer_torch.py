"""The peer: the same training step as a PyTorch user would write it, for Gemma 2 and its likes.

Layers in the manner of `transformers`; attention is torch's flex_attention with a block mask of the same visibility
(Liu et al. 2025, Figure 2) and the softcap as its score modification; every layer under torch.compile, optionally
under activation checkpointing. The text is read without gradient and leaves a cache, traces read it. The decoder is
frozen, in bfloat16 on a GPU; the coprocessor's float32 weights compute under autocast and are AdamW's.

flex_attention has no backward pass on a CPU: there the same mask functions, evaluated for every pair, serve plain
attention in float32.

Letters as in the package. Traces stand one after the other: S counts the M traces' tokens of a row together, and U the
keys that they see, the text's T first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from latent_delib.nn.sizes import TransformerConfig


class Traces(NamedTuple):
    """latents' and tokens' positions [B, M, L], [B, M, L + X]; first text token seen [B, M]; past the last one for the
    latents and for the tokens [B, M] each; inputs [B, M, X], targets and weights [B, M, A]."""

    latent_position: Tensor
    position: Tensor
    start: Tensor
    latent_stop: Tensor
    stop: Tensor
    inputs: Tensor
    targets: Tensor
    weights: Tensor


def document_start(segment_BT: Tensor) -> Tensor:
    """Index of the first token of each token's document, [B, T]."""
    index = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    first = torch.ones_like(segment_BT, dtype=torch.bool)
    first[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def draw(segment_BT: Tensor, num_traces: int) -> Tensor:
    """Random distinct sorted positions that have an ahead token, [B, M]; T - 1, which has none, where they run out."""
    usable = (segment_BT[:, :-1] == segment_BT[:, 1:]) & (segment_BT[:, 1:] > 0)
    noise = torch.rand(usable.shape, device=segment_BT.device).masked_fill(~usable, -1)
    score, at = noise.topk(num_traces)
    return at.masked_fill(score < 0, segment_BT.shape[1] - 1).sort(dim=1).values


def lay_out(
    tokens_BT: Tensor, segment_BT: Tensor, at_BM: Tensor, num_latents: int, num_ahead: int, placement: str
) -> Traces:
    """Traces at text tokens `at_BM`, placed "after" or "overlay"."""
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
    inside = (ahead < T) & (take(segment_BT, ahead) == take(segment_BT, at)) & (take(segment_BT, at) > 0)
    return Traces(
        latent_position=latent_position,
        position=torch.cat([latent_position, at - start + offset + (0 if overlay else num_latents)], dim=-1),
        start=start[..., 0],
        latent_stop=at_BM + 1,
        stop=at_BM + (0 if overlay else 1),
        inputs=take(tokens_BT, at + offset),
        targets=take(tokens_BT, ahead),
        weights=inside.float(),
    )


def text_mask(position_BT: Tensor, start_BT: Tensor, window: int | None) -> Callable:
    """Own document, causally."""

    def sees(b, h, q, kv):
        seen = (kv >= start_BT[b, q]) & (kv <= q)
        return seen if window is None else seen & (position_BT[b, q] - position_BT[b, kv] < window)

    return sees


def trace_mask(
    position_BMS: Tensor, start_BM: Tensor, stop_BM: Tensor, text_position_BT: Tensor, window: int | None
) -> Callable:
    """Text tokens start <= t < stop, and the own trace causally."""
    T, S = text_position_BT.shape[1], position_BMS.shape[2]
    position_BU = torch.cat([text_position_BT, position_BMS.flatten(1)], dim=1)

    def sees(b, h, q, kv):
        text = (kv >= start_BM[b, q // S]) & (kv < stop_BM[b, q // S])
        own = (kv >= T) & ((kv - T) // S == q // S) & (kv - T <= q)
        seen = text | own
        return seen if window is None else seen & (position_BU[b, T + q] - position_BU[b, kv] < window)

    return sees


def softcapped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *, softcap: float) -> Tensor:
    return softcap * torch.tanh(score / softcap)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor, scale: float, softcap: float) -> Tensor:
    """q [B, N, S, H]; k, v [B, K, U, H]; mask: a block mask for flex_attention, or bool [B, 1, S, U] for plain one."""
    if isinstance(mask, BlockMask):
        capped = partial(softcapped, softcap=softcap) if softcap else None
        return flex_attention(q, k, v, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = q @ k.mT * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    return score.masked_fill(~mask, -torch.inf).softmax(-1) @ v


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
    """Cosines and sines, float32 [B, 1, S, H]."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position_BS.device) / head_dim)
    angle = (position_BS[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.embed_dim, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.embed_dim, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.embed_dim, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.embed_dim, bias=False)

    def forward(self, x_BSD, rope, mask, cached):
        c = self.c
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x_BSD).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(q, rope), rotate(k, rope)
        own = k, v
        if cached is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cached, own))
        out = attention(q, k, v, mask, c.query_scale, c.attn_softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2)), own


class MLP(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.embed_dim, c.ffn_dim, bias=False)
        self.up_proj = nn.Linear(c.embed_dim, c.ffn_dim, bias=False)
        self.down_proj = nn.Linear(c.ffn_dim, c.embed_dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.attn, self.mlp = Attention(c), MLP(c)
        self.pre_attn_norm, self.post_attn_norm = RMSNorm(c.embed_dim, c), RMSNorm(c.embed_dim, c)
        self.pre_mlp_norm, self.post_mlp_norm = RMSNorm(c.embed_dim, c), RMSNorm(c.embed_dim, c)

    def forward(self, x_BSD, rope, mask, cached):
        y, kv = self.attn(self.pre_attn_norm(x_BSD), rope, mask, cached)
        x_BSD = x_BSD + self.post_attn_norm(y)
        return x_BSD + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x_BSD))), kv


class Model(nn.Module):
    """A stack of layers over embeddings. A decoder also has a table of tokens, a coprocessor soft tokens."""

    def __init__(self, c: TransformerConfig, num_soft: int = 0):
        super().__init__()
        assert c.post_norms and not c.qk_norm and not c.rope_scaling and c.activation == "gelu", "a Gemma 2"
        self.c = c
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.embed_dim, c)
        table = torch.randn(num_soft or c.vocab_size, c.embed_dim) * c.embed_dim**-0.5
        self.register_parameter("soft_tokens" if num_soft else "embedding", nn.Parameter(table))

    def embed(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding)
        return x * torch.tensor(self.c.embed_dim**0.5, dtype=x.dtype) if self.c.scale_embeddings else x

    def forward(self, x_BSD, position_BS, masks, caches=None, checkpointed=False):
        """Final-normed outputs, and every layer's keys and values; masks: for global layers and for local ones."""
        c, kvs = self.c, []
        ropes = [rotary(position_BS, c.head_dim, base) for base in (c.rope_base, c.local_rope_base)]
        for i, (layer, local) in enumerate(zip(self.layers, c.is_local)):
            call = partial(checkpoint, layer, use_reentrant=False) if checkpointed else layer
            x_BSD, kv = call(x_BSD, ropes[local], masks[local], None if caches is None else caches[i])
            kvs.append(kv)
        return self.norm(x_BSD), kvs


class Peer:
    """The training step: a frozen decoder, a coprocessor, its optimizer. `optimizer` is config.optimizer.

    compiled: torch.compile on every layer and on the loss. checkpointed: layers keep their input alone.
    """

    def __init__(
        self,
        c: TransformerConfig,
        num_latents: int,
        num_ahead: int,
        placement: str,
        optimizer: Any,
        device: str,
        compiled: bool,
        checkpointed: bool = True,
    ):
        self.c, self.num_latents, self.num_ahead, self.placement = c, num_latents, num_ahead, placement
        self.device, self.checkpointed, self.clip_norm = torch.device(device), checkpointed, optimizer.clip_norm
        self.flex = self.device.type != "cpu"
        self.dtype = torch.bfloat16 if self.flex else torch.float32
        with self.device:
            self.decoder = Model(c).to(self.dtype).requires_grad_(False)
            self.coprocessor = Model(c, num_latents)
        self.block_mask, self.nll = create_block_mask, token_nll
        if compiled:
            # One code serves all layers; text, latents and traces are three shapes of it, each compiled for itself.
            torch.compiler.reset()
            torch._dynamo.config.recompile_limit = 32
            for layer in (*self.decoder.layers, *self.coprocessor.layers):
                layer.compile(dynamic=False)
            self.block_mask = torch.compile(create_block_mask, dynamic=False)
            self.nll = torch.compile(token_nll, dynamic=False)
        soft = self.coprocessor.soft_tokens
        body = [p for p in self.coprocessor.parameters() if p is not soft]
        rates = optimizer.learning_rate, optimizer.soft_token_learning_rate
        self.optimizer = torch.optim.AdamW(
            [{"params": body, "lr": rates[0]}, {"params": [soft], "lr": rates[1]}],
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def masks(self, make: Callable, batch: int, queries: int, keys: int) -> list[BlockMask | Tensor]:
        """Of global and of local layers; `make(window)` is a mask function."""
        create = self.block_mask if self.flex else create_mask
        return [create(make(w), batch, None, queries, keys, device=self.device) for w in (None, self.c.window)]

    def loss(self, tokens_BT: Tensor, segment_BT: Tensor, at_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Σ loss in nats of all traces' ahead tokens, and Σ tokens."""
        (B, T), M = tokens_BT.shape, at_BM.shape[1]
        traces = lay_out(tokens_BT, segment_BT, at_BM, self.num_latents, self.num_ahead, self.placement)
        start_BT = document_start(segment_BT)
        text_position = torch.arange(T, device=self.device) - start_BT

        def read(model: Model, x_BMSD: Tensor, position_BMS: Tensor, stop_BM: Tensor) -> Tensor:
            make = partial(trace_mask, position_BMS, traces.start, stop_BM, text_position)
            S = M * position_BMS.shape[2]
            x, position = x_BMSD.flatten(1, 2), position_BMS.flatten(1)
            out, _ = model(x, position, self.masks(make, B, S, T + S), cache, self.checkpointed)
            return out.view(x_BMSD.shape)

        with torch.no_grad():
            masks = self.masks(partial(text_mask, text_position, start_BT), B, T, T)
            _, cache = self.decoder(self.decoder.embed(tokens_BT), text_position, masks)
        soft = self.coprocessor.soft_tokens.to(self.dtype).expand(B, M, -1, -1)
        z = read(self.coprocessor, soft, traces.latent_position, traces.latent_stop)
        x = torch.cat([z, self.decoder.embed(traces.inputs)], dim=2)
        out = read(self.decoder, x, traces.position, traces.stop)[:, :, -self.num_ahead :]
        rows, targets = out.flatten(0, 2), traces.targets.flatten()
        nll = torch.cat(
            [
                checkpoint(self.nll, r, self.decoder.embedding, t, self.c.final_softcap, use_reentrant=False)
                for r, t in zip(rows.split(2048), targets.split(2048))
            ]
        )
        return (nll * traces.weights.flatten()).sum(), traces.weights.sum()

    def step(self, tokens_BT: Tensor, segment_BT: Tensor, num_traces: int) -> Tensor:
        """One optimizer step; the mean loss, still on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.flex):
            loss, tokens = self.loss(tokens_BT, segment_BT, draw(segment_BT, num_traces))
        mean = loss / tokens.clamp(min=1)
        mean.backward()
        nn.utils.clip_grad_norm_(self.coprocessor.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean.detach()


def wait(_: Any = None) -> None:
    """Until the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def token_nll(x_RD: Tensor, embedding_VD: Tensor, target_R: Tensor, softcap: float) -> Tensor:
    """-log p(target) of a chunk of rows, float32 [R]."""
    logits = (x_RD @ embedding_VD.T).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target_R, reduction="none")


def load(model: Model, tree: dict[str, Any]) -> None:
    """The weights of a parameter tree of ours: layers stacked on the first axis, heads on an axis of their own."""
    layers, state = tree["layers"], {"norm.weight": tree["final_norm"]["scale"]}
    for name in ("embedding", "soft_tokens"):
        if name in tree:
            state[name] = tree[name]
    for i in range(model.c.num_layers):
        for name in ("q", "k", "v"):
            state[f"layers.{i}.attn.{name}_proj.weight"] = layers["attn"][name][i].reshape(model.c.embed_dim, -1).T
        state[f"layers.{i}.attn.o_proj.weight"] = layers["attn"]["out"][i].reshape(-1, model.c.embed_dim).T
        for name in ("gate", "up", "down"):
            state[f"layers.{i}.mlp.{name}_proj.weight"] = layers["mlp"][name][i].T
        for name in ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm"):
            state[f"layers.{i}.{name}.weight"] = layers[name]["scale"][i]
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
