"""The Python interface: a decoder, a coprocessor, and the language model the two make."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib import checkpoint, engine, step
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.nn import transformer
from latent_delib.nn.attention_forms import choose
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params, Transformer
from latent_delib.tokenizer import Tokenizer
from latent_delib.weights import coprocessor as exported
from latent_delib.weights import folder


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A frozen decoder. params: {"layers", "final_norm", "embedding" [V, D]}; fingerprint: SHA-256, hex."""

    config: TransformerConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Coprocessor:
    """What writes latents for one decoder. params["soft_tokens"] is [L, D]; step is None where untrained."""

    params: Params
    method: str
    num_latents: int
    placement: str
    fingerprint: str
    step: int | None = None


def load_decoder(path: str, dtype: Any = jnp.float32) -> Decoder:
    """A decoder folder, or "packaged"; parameters in `dtype`, which is the dtype everything computes in.

    Raises:
      UserError: missing files, or tensors that do not fit the architecture.
    """
    where = folder.locate(path)
    config = folder.read_config(where)
    params = folder.load(where, config, dtype)
    return Decoder(config, params, Tokenizer(folder.tokenizer_path(where)), folder.fingerprint(where))


def load_coprocessor(workdir: str, step: int | None = None) -> Coprocessor:
    """The coprocessor a training job wrote to `workdir`, at its newest step or at `step`; or one that was exported.

    Raises:
      UserError: no such checkpoint or folder, or a checkpoint of a method that writes no latents.
    """
    if (Path(workdir) / exported.FILE).is_file():
        fields, params = exported.load(Path(workdir))
        if step not in (None, fields["step"]):
            raise UserError(f"{workdir}: holds the coprocessor of step {fields['step']}, not of step {step}")
        del fields["format"], fields["architecture"]
        return Coprocessor(params, **fields)

    def check(meta: dict[str, Any]) -> None:
        if METHODS[meta["method.name"]].latents is None:
            raise UserError(f"{workdir}: method {meta['method.name']!r} has no coprocessor")

    checkpoints, *_ = checkpoint.open_for_reading(workdir, step)
    found = checkpoints.restore_newest(step=step, check=check)
    checkpoints.close()
    assert found is not None, "open_for_reading saw one"
    method, num_latents, placement = (found.meta[f"method.{key}"] for key in ("name", "num_latents", "placement"))
    params = found.trainable["coprocessor"]
    return Coprocessor(params, method, num_latents, placement, found.meta["fingerprint"], found.step)


def init_coprocessor(decoder: Decoder, num_latents: int = 16, placement: str = "after", seed: int = 0) -> Coprocessor:
    """An untrained coprocessor: the decoder's weights, and soft tokens from random rows of its token table."""
    if placement not in PLACEMENTS:
        raise UserError(f"placement={placement!r}: expected one of {sorted(PLACEMENTS)}")
    if not 1 <= num_latents <= decoder.config.vocab_size:
        raise UserError(f"num_latents={num_latents}: expected 1 to {decoder.config.vocab_size}")
    method = "cache_augmentation"
    tree = METHODS[method].init(jax.random.key(seed), decoder.params, Transformer(decoder.config), num_latents)
    return Coprocessor(tree["coprocessor"], method, num_latents, placement, decoder.fingerprint)


class AugmentedLM:
    """A decoder and a coprocessor as one language model; without a coprocessor, the decoder as it is.

    Arrays of tokens hold one document a row, BOS first; padding on the right does not change what stands before it.

    Raises:
      UserError: a coprocessor of another decoder.
    """

    def __init__(self, decoder: Decoder, coprocessor: Coprocessor | None = None):
        self.decoder, self.coprocessor, self.tokenizer = decoder, coprocessor, decoder.tokenizer
        self.dtype = decoder.params["embedding"].dtype
        self.params: Params = {"decoder": decoder.params}
        model = Transformer(decoder.config, form=choose("auto", jax.default_backend()))
        if coprocessor is None:
            self.aug = Augmentation(model, "decoder", 0)
            return
        if coprocessor.fingerprint != decoder.fingerprint:
            raise UserError(
                f"coprocessor belongs to decoder {coprocessor.fingerprint[:12]}, "
                f"this decoder is {decoder.fingerprint[:12]}"
            )
        self.aug = Augmentation(model, coprocessor.method, coprocessor.num_latents, coprocessor.placement)
        self.params["coprocessor"] = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), coprocessor.params)

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """The plain decoder's logits, float32 [B, T, V]."""
        tokens = self._check_tokens(tokens_BT)
        return _logits(self.params, tokens, aug=self.aug, dtype=self.dtype)

    def latents(self, tokens_BT: jax.Array, positions_BM: jax.Array) -> jax.Array:
        """Latents [B, M, L, D] written after reading row b up to and with token positions[b, m]."""
        self._check_augmented()
        tokens = self._check_tokens(tokens_BT)
        positions = self._check_positions(tokens, positions_BM, 0)
        return _latents(self.params, tokens, positions, aug=self.aug, dtype=self.dtype)

    def ahead_logprobs(self, tokens_BT: jax.Array, positions_BM: jax.Array, ahead: int) -> tuple[jax.Array, jax.Array]:
        """log p of the `ahead` text tokens after each position: (decoder, augmented), float32 [B, M, A] each.

        Augmented: given the text up to the position, its latents, and the ahead tokens before. Every position needs
        `ahead` tokens after it. Without a coprocessor both are the decoder's.
        """
        if ahead < 1:
            raise UserError(f"ahead={ahead}: expected at least 1")
        tokens = self._check_tokens(tokens_BT)
        positions = self._check_positions(tokens, positions_BM, ahead)
        return _ahead_logprobs(self.params, tokens, positions, aug=self.aug, dtype=self.dtype, ahead=ahead)

    def logprobs(
        self, prompts: Sequence[str], continuations: Sequence[str], augment: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p of each continuation after its prompt, summed over its tokens (float32 [B]), and whether every one
        of them is the likeliest token (bool [B]). Latents join once, at the end of the prompt."""
        if len(prompts) != len(continuations):
            raise UserError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        heads = [self._prompt(p) for p in prompts]
        tails = [self.tokenizer.encode(c) for c in continuations]
        if empty := [i for i, tail in enumerate(tails) if not tail]:
            raise UserError(f"continuation {empty[0]} is empty")
        text, _ = self._pad([h + t for h, t in zip(heads, tails)])
        at = jnp.array([[len(h) - 1] for h in heads])
        ahead = _round_up(max(map(len, tails)), 8)
        text = jnp.pad(text, ((0, 0), (0, ahead)), constant_values=self.tokenizer.pad_id)
        nll, greedy = _continuations(
            self.params, text, at, aug=self.aug, dtype=self.dtype, ahead=ahead, augmented=self._augments(augment)
        )
        inside = np.arange(ahead) < np.array([[len(t)] for t in tails])
        return -np.where(inside, nll, 0).sum(axis=1), np.all(np.where(inside, greedy, True), axis=1)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        augment: bool = True,
        delay: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """Continuations of the prompts, without the prompts.

        Args:
          temperature: 0 takes the likeliest token. top_p: samples from the likeliest tokens that reach it together.
          augment: latents join once, at the end of the prompt, or `delay` tokens later.
        """
        if max_new_tokens < 1 or delay < 0 or temperature < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} (at least 1), delay={delay} (at least 0), temperature={temperature} "
                f"(at least 0), top_p={top_p} (above 0, at most 1): out of range"
            )
        text, lengths = self._pad([self._prompt(p) for p in prompts])
        new = engine.generate(
            self.params,
            text,
            lengths,
            jax.random.key(seed),
            jnp.float32(temperature),
            jnp.float32(top_p),
            aug=self.aug,
            dtype=self.dtype,
            max_new_tokens=max_new_tokens,
            augmented=self._augments(augment),
            delay=delay,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
        )
        return [self.tokenizer.decode(row) for row in np.asarray(new)]

    def _augments(self, augment: bool) -> bool:
        return augment and self.coprocessor is not None

    def _prompt(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def _pad(self, rows: Sequence[list[int]]) -> tuple[jax.Array, jax.Array]:
        """Rows padded to a common length, rounded up so that few lengths are ever compiled; and their lengths."""
        if not rows:
            raise UserError("no prompts were given")
        padded = np.full((len(rows), _round_up(max(map(len, rows)), 32)), self.tokenizer.pad_id, np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)

    def _check_augmented(self) -> None:
        if self.coprocessor is None:
            raise UserError("this model has no coprocessor, so no latents")

    def _check_tokens(self, tokens_BT: Any) -> jax.Array:
        tokens = np.asarray(tokens_BT)
        V = self.decoder.config.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"tokens: {tokens.dtype} of shape {tokens.shape}, expected integers [B, T]")
        if tokens.size and not (0 <= tokens.min() and tokens.max() < V):
            raise UserError(f"tokens: from {tokens.min()} to {tokens.max()}, the vocabulary has {V}")
        return jnp.asarray(tokens, jnp.int32)

    def _check_positions(self, tokens: jax.Array, positions_BM: Any, ahead: int) -> jax.Array:
        positions, (B, T) = np.asarray(positions_BM), tokens.shape
        if positions.ndim != 2 or positions.shape[0] != B or not np.issubdtype(positions.dtype, np.integer):
            raise UserError(f"positions: {positions.dtype} of shape {positions.shape}, expected integers [{B}, M]")
        if positions.size and not (0 <= positions.min() and positions.max() + ahead < T):
            raise UserError(
                f"positions: from {positions.min()} to {positions.max()} with {ahead} ahead tokens, the text has {T}"
            )
        return jnp.asarray(positions, jnp.int32)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@partial(jax.jit, static_argnames=("aug", "dtype"))
def _logits(params: Params, tokens_BT: jax.Array, *, aug: Augmentation, dtype: Any) -> jax.Array:
    x_BTD, _ = augment.read(aug, params, tokens_BT, jnp.ones_like(tokens_BT), dtype)
    return transformer.unembed(params["decoder"]["embedding"], x_BTD, aug.transformer.config)


@partial(jax.jit, static_argnames=("aug", "dtype"))
def _latents(params: Params, tokens_BT: jax.Array, at_BM: jax.Array, *, aug: Augmentation, dtype: Any) -> jax.Array:
    segment_BT = jnp.ones_like(tokens_BT)
    _, cache = augment.read(aug, params, tokens_BT, segment_BT, dtype)
    return augment.latents(aug, params, cache, aug.lay_out(tokens_BT, segment_BT, at_BM, 1))


@partial(jax.jit, static_argnames=("aug", "dtype", "ahead"))
def _ahead_logprobs(
    params: Params, tokens_BT: jax.Array, at_BM: jax.Array, *, aug: Augmentation, dtype: Any, ahead: int
) -> tuple[jax.Array, jax.Array]:
    segment_BT = jnp.ones_like(tokens_BT)
    cache, text_nll = step.read_step(params, tokens_BT, segment_BT, aug=aug, dtype=dtype)
    index = at_BM[..., None] + jnp.arange(ahead)
    decoder_BMA = -jnp.take_along_axis(text_nll[:, None], index, axis=2)
    if not aug.has_latents:
        return decoder_BMA, decoder_BMA
    nll_BMA, _ = step.ahead_step(params, cache, tokens_BT, segment_BT, at_BM, aug=aug, num_ahead=ahead)
    return decoder_BMA, -nll_BMA


@partial(jax.jit, static_argnames=("aug", "dtype", "ahead", "augmented"))
def _continuations(
    params: Params, text_BT: jax.Array, at_B1: jax.Array, *, aug: Augmentation, dtype: Any, ahead: int, augmented: bool
) -> tuple[jax.Array, jax.Array]:
    """-log p, and whether it is the likeliest token, of the `ahead` text tokens after each position; [B, A] each."""
    segment_BT = jnp.ones_like(text_BT)
    x_BTD, cache = augment.read(aug, params, text_BT, segment_BT, dtype)
    marks = aug.lay_out(text_BT, segment_BT, at_B1, ahead)
    if augmented:
        x_BMAD, _ = augment.decode(aug, params, augment.latents(aug, params, cache, marks), cache, marks)
        x_BAD = x_BMAD[:, 0]
    else:
        x_BAD = jnp.take_along_axis(x_BTD, (at_B1 + jnp.arange(ahead))[..., None], axis=1)
    targets_BA = marks.targets[:, 0]
    logits_BAV = transformer.unembed(params["decoder"]["embedding"], x_BAD, aug.transformer.config)
    return augment.nll(aug, params, x_BAD, targets_BA), jnp.argmax(logits_BAV, axis=-1) == targets_BA
