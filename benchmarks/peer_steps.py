"""Holds the peer's training steps: `Peer` trains a coprocessor, `DecoderPeer` a whole decoder.

The model is `peer_torch`'s. The decoder reads the text without gradient, and traces read its cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from benchmarks.peer_torch import (
    FORMS,
    Form,
    Model,
    document_start,
    draw,
    flex,
    lay_out,
    pairs,
    plain,
    text_mask,
    token_nll,
    trace_mask,
)
from latent_delib.nn.sizes import TransformerConfig


def adamw(model: Model, optimizer: Any) -> torch.optim.AdamW:
    """Returns AdamW as ours, by config.optimizer.

    Soft tokens have a rate of their own, and neither they nor norms decay.
    """
    soft, norms, matrices = [], [], []
    for name, parameter in model.named_parameters():
        kind = soft if name == "soft_tokens" else norms if "norm" in name else matrices
        kind.append(parameter)
    rate, soft_rate = optimizer.learning_rate, optimizer.soft_token_learning_rate
    groups = [
        {"params": soft, "lr": soft_rate, "weight_decay": 0.0},
        {"params": norms, "lr": rate, "weight_decay": 0.0},
        {"params": matrices, "lr": rate, "weight_decay": optimizer.weight_decay},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(optimizer.b1, optimizer.b2),
        eps=optimizer.eps,
        fused=True,
    )


class Trained:
    """Trains a model by config.optimizer: clips its gradients, then applies them by AdamW."""

    def __init__(self, model: Model, optimizer: Any):
        self.model, self.clip_norm, self.adamw = model, optimizer.clip_norm, adamw(model, optimizer)

    def update(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Steps down the mean of a sum over tokens; returns that mean, still on the device."""
        mean = loss / tokens.clamp(min=1)
        mean.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return mean.detach()


class DecoderPeer:
    """Trains a whole decoder on a CPU, in float32; compiled: its loss is under torch.compile."""

    def __init__(self, c: TransformerConfig, optimizer: Any, compiled: bool):
        self.c, self.decoder = c, Model(c, plain)
        self.trained = Trained(self.decoder, optimizer)
        if compiled:
            torch.compiler.reset()
            self.loss = torch.compile(self.loss, dynamic=False)

    def loss(self, tokens_BT: Tensor, segment_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Σ loss in nats of all text, and Σ tokens."""
        B, T = tokens_BT.shape
        start_BT = document_start(segment_BT)
        position = torch.arange(T) - start_BT
        masks = [
            pairs(text_mask(position, start_BT, w), B, 1, T, 0, tokens_BT.device)
            for w in (None, self.c.window)
        ]
        out, _ = self.decoder(self.decoder.embed(tokens_BT), position, masks)
        rows, targets = out[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()
        nll = token_nll(rows, self.decoder.embedding, targets, self.c.final_softcap)
        inside = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
        return (nll * inside.flatten()).sum(), inside.sum()

    def step(self, tokens_BT: Tensor, segment_BT: Tensor) -> Tensor:
        """Makes one optimizer step; returns the mean loss."""
        return self.trained.update(*self.loss(tokens_BT, segment_BT))


class Peer:
    """Trains a coprocessor over a frozen decoder, by config.optimizer.

    On a GPU the decoder is in bfloat16, and the coprocessor's float32 weights compute under
    autocast; on a CPU all is float32.

    form: of attention; by default the device's. compiled: torch.compile, with `flex` on every
    layer, otherwise on the loss as a whole. checkpointed: layers keep their input alone, and no
    logits are kept.
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
        form: Form | None = None,
    ):
        self.c, self.placement = c, placement
        self.num_latents, self.num_ahead = num_latents, num_ahead
        self.device, self.checkpointed = torch.device(device), checkpointed
        self.attend, self.mask = form or FORMS[self.device.type]
        self.half = self.device.type != "cpu"
        self.dtype = torch.bfloat16 if self.half else torch.float32
        with self.device:
            self.decoder = Model(c, self.attend).to(self.dtype).requires_grad_(False)
            self.coprocessor = Model(c, self.attend, num_latents)
        self.trained = Trained(self.coprocessor, optimizer)
        self.nll = token_nll
        if compiled:
            self.compile()

    def compile(self) -> None:
        torch.compiler.reset()
        if self.attend is not flex:
            self.loss = torch.compile(self.loss, dynamic=False)
            return
        # All layers share one code; text, latents and traces are three shapes, each compiled once.
        torch._dynamo.config.recompile_limit = 32
        for layer in (*self.decoder.layers, *self.coprocessor.layers):
            layer.compile(dynamic=False)
        self.mask = torch.compile(self.mask, dynamic=False)
        self.nll = torch.compile(token_nll, dynamic=False)

    def masks(
        self, make: Callable, batch: int, traces: int, size: int, text: int
    ) -> list[BlockMask | Tensor]:
        """Returns the masks of global and of local layers; `make(window)` is a mask function."""
        sizes = batch, traces, size, text
        return [self.mask(make(window), *sizes, self.device) for window in (None, self.c.window)]

    def loss(self, tokens_BT: Tensor, segment_BT: Tensor, at_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Σ loss in nats of all traces' ahead tokens, and Σ tokens."""
        (B, T), M = tokens_BT.shape, at_BM.shape[1]
        traces = lay_out(
            tokens_BT, segment_BT, at_BM, self.num_latents, self.num_ahead, self.placement
        )
        start_BT = document_start(segment_BT)
        text_position = torch.arange(T, device=self.device) - start_BT

        def read(model: Model, x_BMXD: Tensor, position_BMX: Tensor, stop_BM: Tensor) -> Tensor:
            make = partial(trace_mask, position_BMX, traces.start, stop_BM, text_position)
            masks = self.masks(make, B, M, position_BMX.shape[2], T)
            out, _ = model(
                x_BMXD.flatten(1, 2), position_BMX.flatten(1), masks, cache, self.checkpointed
            )
            return out.view(x_BMXD.shape)

        with torch.no_grad():
            masks = self.masks(partial(text_mask, text_position, start_BT), B, 1, T, 0)
            _, cache = self.decoder(self.decoder.embed(tokens_BT), text_position, masks)
        soft = self.coprocessor.soft_tokens.to(self.dtype).expand(B, M, -1, -1)
        z = read(self.coprocessor, soft, traces.latent_position, traces.latent_stop)
        x = torch.cat([z, self.decoder.embed(traces.inputs)], dim=2)
        out = read(self.decoder, x, traces.position, traces.stop)[:, :, -self.num_ahead :]
        nll = self.nll
        if self.checkpointed:
            nll = partial(checkpoint, self.nll, use_reentrant=False)
        chunks = zip(out.flatten(0, 2).split(2048), traces.targets.flatten().split(2048))
        losses = torch.cat(
            [nll(rows, self.decoder.embedding, t, self.c.final_softcap) for rows, t in chunks]
        )
        return (losses * traces.weights.flatten()).sum(), traces.weights.sum()

    def step(self, tokens_BT: Tensor, segment_BT: Tensor, num_traces: int) -> Tensor:
        """Makes one optimizer step; returns the mean loss, still on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss, tokens = self.loss(tokens_BT, segment_BT, draw(segment_BT, num_traces))
        return self.trained.update(loss, tokens)
