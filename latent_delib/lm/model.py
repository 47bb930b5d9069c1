"""The language model that a decoder and a coprocessor make."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents
from latent_delib.delib.methods import param_axes
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.lm import decoding, scoring
from latent_delib.lm.asynchronous import Beside
from latent_delib.lm.load import Coprocessor, Decoder
from latent_delib.machine import arguments
from latent_delib.nn.attention.forms import FORMS
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.transformer import Params


class Continuation(NamedTuple):
    """What followed a prompt. tokens: int32 [new], padded after EOS. joined: after how many of them latents joined."""

    text: str
    tokens: np.ndarray
    joined: tuple[int, ...]


Prompt = str | Sequence[int]  # text, to which BOS is added; or token ids as they are
Report = Callable[[int], None]  # is told how much is done


class AugmentedLM:
    """A decoder and a coprocessor as one language model; without a coprocessor, the decoder as it is.

    Arrays of tokens hold one document a row, BOS first; padding on the right does not change what stands before it.
    Lists of prompts may be of any length: they are taken `batch_size` at a time, those of like length together, in few
    shapes, each compiled once. What comes back is in the order of the prompts.

    Args:
      mesh: where the decoder and its caches lie (`mesh.make`); by default the first device.
      coprocessor_mesh: devices of the coprocessor's own, where it is to work beside the decoder (`delay=None`).
      max_length: tokens of a prompt and its continuation together. What a decoder was trained on bounds what makes
        sense, memory what fits.
      attention: the form of attention, as `compute.attention` of a config: "auto", by platform, or one of
        `nn.attention_forms.FORMS`.

    Raises:
      UserError: a coprocessor of another decoder, or an argument of another kind.
    """

    def __init__(
        self,
        decoder: Decoder,
        coprocessor: Coprocessor | None = None,
        mesh: Mesh | None = None,
        coprocessor_mesh: Mesh | None = None,
        max_length: int = 8192,
        attention: str = "auto",
    ):
        arguments.instance("decoder", decoder, Decoder, "load_decoder")
        if coprocessor is not None:
            arguments.instance("coprocessor", coprocessor, Coprocessor, "load_coprocessor")
        check_attention(attention)
        self.decoder, self.coprocessor, self.tokenizer = decoder, coprocessor, decoder.tokenizer
        self.dtype = decoder.params["embedding"].dtype
        self.max_length = arguments.whole("max_length", max_length, 2)
        self.mesh, self.coprocessor_mesh = mesh or build.one_device(), coprocessor_mesh
        self.plain = Augmentation(build.transformer(decoder.config, self.mesh, form=attention), "decoder", 0)
        self.params: Params = {"decoder": _place(self.mesh, decoder.params, self.dtype)}
        self.aug = self.plain
        if coprocessor is None:
            return
        if coprocessor.fingerprint != decoder.fingerprint:
            raise UserError(
                f"coprocessor belongs to decoder {coprocessor.fingerprint[:12]}, "
                f"this decoder is {decoder.fingerprint[:12]}"
            )
        of = coprocessor
        own = build.transformer(of.architecture, self.mesh, form=attention) if of.architecture else None
        self.aug = Augmentation(self.plain.transformer, of.method, of.num_latents, of.placement, coprocessor=own)
        axes = param_axes(of.method)
        self.params = augment.assemble(self.params, {"coprocessor": _place(self.mesh, of.params, self.dtype, axes)})
        if coprocessor_mesh is not None:
            model = build.transformer(decoder.config, coprocessor_mesh, form=attention)
            own = build.transformer(of.architecture, coprocessor_mesh, form=attention) if of.architecture else None
            self.aug_beside = dataclasses.replace(self.aug, transformer=model, coprocessor=own)
            self.params_beside = {"coprocessor": _place(coprocessor_mesh, self.params["coprocessor"], self.dtype, axes)}

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """The plain decoder's logits, float32 [B, T, V]."""
        tokens = self._check_tokens(tokens_BT)
        return scoring.logits(self.params, tokens, aug=self.aug, dtype=self.dtype)

    def latents(self, tokens_BT: jax.Array, positions_BM: jax.Array) -> Latents:
        """Latents [B, M, L, D] written after reading row b up to and with token positions[b, m]; of a method that
        inserts keys and values, those."""
        self._check_augmented()
        tokens = self._check_tokens(tokens_BT)
        positions = self._check_positions(tokens, positions_BM, 0)
        return scoring.latents(self.params, tokens, positions, aug=self.aug, dtype=self.dtype)

    def ahead_logprobs(self, tokens_BT: jax.Array, positions_BM: jax.Array, ahead: int) -> tuple[jax.Array, jax.Array]:
        """log p of the `ahead` text tokens after each position: (decoder, augmented), float32 [B, M, A] each.

        Augmented: given the text up to the position, its latents, and the ahead tokens before. Every position needs
        `ahead` tokens after it. Without a coprocessor both are the decoder's.
        """
        ahead = arguments.whole("ahead", ahead, 1)
        tokens = self._check_tokens(tokens_BT)
        positions = self._check_positions(tokens, positions_BM, ahead)
        return scoring.ahead_logprobs(self.params, tokens, positions, aug=self.aug, dtype=self.dtype, ahead=ahead)

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        augment: bool = True,
        batch_size: int = 16,
        progress: Report | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p of each continuation after its prompt, summed over its tokens (float32 [N]), and whether every one
        of them is the likeliest token (bool [N]). Latents join once, at the end of the prompt.

        Equal prompts are read once. progress: is told how many continuations are done.
        """
        prompts = arguments.several("prompts", prompts)
        continuations = arguments.several("continuations", continuations)
        batch_size = arguments.whole("batch_size", batch_size, 1)
        if len(prompts) != len(continuations):
            raise UserError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        tails = [self._ids(c, f"continuations[{i}]") for i, c in enumerate(continuations)]
        if empty := [i for i, tail in enumerate(tails) if not tail]:
            raise UserError(f"continuations[{empty[0]}] is empty")
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            head = self._prompt(prompt, f"prompts[{i}]")
            self._check_length(f"prompts[{i}]", len(head), len(tails[i]))
            groups[tuple(head)].append(i)
        # A row is a prompt with some of its continuations, alike in number.
        rows = [(h, some[i : i + 8]) for h, some in groups.items() for i in range(0, len(some), 8)]
        sums, greedy, done = np.zeros(len(tails), np.float32), np.zeros(len(tails), bool), 0
        keys = [(_power(len(some)), len(h) + max(len(tails[i]) for i in some)) for h, some in rows]
        for chosen in self._batches(keys, lambda key: max(1, batch_size // key[0])):
            M = max(keys[r][0] for r in chosen)
            A = _round_up(max(len(tails[i]) for r in chosen for i in rows[r][1]), 8)
            text, length = self._pad([rows[r][0] for r in chosen])
            tails_BMA = np.full((len(length), M, A), self.tokenizer.pad_id, np.int32)
            inside = np.zeros(tails_BMA.shape, bool)
            for b, m, i in (at := [(b, m, i) for b, r in enumerate(chosen) for m, i in enumerate(rows[r][1])]):
                tails_BMA[b, m, : len(tails[i])], inside[b, m, : len(tails[i])] = tails[i], True
            logp, likeliest = scoring.continuations(
                self.params, text, length, self._rows(tails_BMA), aug=self._aug(augment), dtype=self.dtype
            )
            total, all_likeliest = (
                np.where(inside, np.asarray(logp), 0).sum(axis=2),
                np.all(np.asarray(likeliest) | ~inside, axis=2),
            )
            for b, m, i in at:
                sums[i], greedy[i] = total[b, m], all_likeliest[b, m]
            done += len(at)
            if progress:
                progress(done)
        return sums, greedy

    def rolling_logprobs(
        self,
        texts: Sequence[Prompt],
        augment: bool = True,
        every: int = 0,
        batch_size: int = 16,
        progress: Report | None = None,
    ) -> np.ndarray:
        """log p of all tokens of each text after BOS, summed, float64 [N].

        Latents join after BOS, and where `every` is not 0 again after each `every` tokens more. A text longer than
        max_length is cut into pieces that each begin with BOS. progress: is told how many pieces are done.
        """
        texts = arguments.several("texts", texts)
        every = arguments.whole("every", every, 0)
        batch_size = arguments.whole("batch_size", batch_size, 1)
        pieces: list[np.ndarray] = []
        owner: list[int] = []
        for i, text in enumerate(texts):
            ids = np.array(self._ids(text, f"texts[{i}]"), np.int32)
            ids = ids[1:] if len(ids) and ids[0] == self.tokenizer.bos_id else ids
            more = [p for p in batches.pieces(ids, self.max_length, self.tokenizer.bos_id) if len(p) > 1]
            pieces, owner = pieces + more, owner + [i] * len(more)
        sums, done = np.zeros(len(texts)), 0
        for chosen in self._batches([(1, len(p)) for p in pieces], lambda key: batch_size):
            tokens, length = self._pad([pieces[r] for r in chosen])
            segment = self._rows((np.arange(tokens.shape[1]) < np.asarray(length)[:, None]).astype(np.int32))
            aug = self._aug(augment)
            found = scoring.text_logprob(self.params, tokens, segment, aug=aug, dtype=self.dtype, every=every)
            np.add.at(sums, [owner[r] for r in chosen], np.asarray(found, np.float64)[: len(chosen)])
            done += len(chosen)
            if progress:
                progress(done)
        return sums

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int = 64, **options: Any) -> list[str]:
        """Continuations of the prompts, without the prompts; options as for `continuations`."""
        return [c.text for c in self.continuations(prompts, max_new_tokens, **options)]

    def continuations(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        augment: bool = True,
        every: int = 0,
        delay: int | None = 0,
        batch_size: int = 16,
        progress: Report | None = None,
    ) -> list[Continuation]:
        """Continues the prompts.

        Args:
          temperature: 0 takes the likeliest token. top_k, top_p: samples from the likeliest tokens, that many (0: all),
            or as many as reach that probability together.
          stop: a text ends before the first of these strings; one string alone is the list of it.
          seed: one for each prompt, or one from which each gets its own by its place in the list.
          augment: latents join at the end of the prompt, and where `every` is not 0 again after each `every` tokens.
          delay: latents join that many tokens after the text they were written for. None: when they are
            ready; the coprocessor works on devices of its own meanwhile, and a failure of it costs the latents alone.
          progress: is told how many tokens are decoded, over all prompts.
        """
        check_options(max_new_tokens, temperature, top_k, top_p, every, delay, batch_size)
        max_new_tokens, top_k, every, batch_size = map(int, (max_new_tokens, top_k, every, batch_size))  # numpy's too
        delay = None if delay is None else int(delay)
        prompts = arguments.several("prompts", prompts)
        stop = _stops(stop)
        if delay is None and self.coprocessor is not None and self.coprocessor_mesh is None:
            raise UserError("delay=None: give the coprocessor devices of its own (coprocessor_mesh)")
        seeds = _seeds(seed, len(prompts))
        heads = [self._prompt(p, f"prompts[{i}]") for i, p in enumerate(prompts)]
        for i, (prompt, head) in enumerate(zip(prompts, heads)):
            if isinstance(prompt, str) and not prompt:
                raise UserError(f"prompts[{i}] is empty")
            self._check_length(f"prompts[{i}]", len(head), max_new_tokens)
        room = _bucket(max_new_tokens)
        ends = {self.tokenizer.control[s] for s in stop if s in self.tokenizer.control}  # of which text shows no trace
        found: dict[int, Continuation] = {}
        for chosen in self._batches([(1, len(h)) for h in heads], lambda key: batch_size):
            text, length = self._pad([heads[i] for i in chosen])
            keys = [jax.random.fold_in(jax.random.key(a), b) for a, b in (seeds[i] for i in chosen)]
            keys += keys[:1] * (len(length) - len(keys))
            likeliest = jnp.int32(min(top_k, self.decoder.config.vocab_size))  # there are no more tokens
            sampling = decoding.Sampling(
                jnp.float32(temperature), likeliest, jnp.float32(top_p), self._rows(jnp.stack(keys))
            )

            def look(new: np.ndarray, chosen: Sequence[int] = chosen) -> np.ndarray:
                if progress:
                    progress(max_new_tokens * len(found) + new.shape[1] * len(chosen))
                texts = [self.tokenizer.decode(row) if stop else "" for row in new]
                ended = np.isin(new, list(ends)).any(axis=1)
                return ended | np.array([any(s in text for s in stop) for text in texts])

            new, joined = decoding.run(
                self.params,
                text,
                length,
                sampling,
                self._coprocessor(augment, delay),
                aug=self.aug,
                room=room,
                max_new_tokens=max_new_tokens,
                every=every if self._augments(augment) else 0,
                eos_id=self.tokenizer.eos_id,
                pad_id=self.tokenizer.pad_id,
                look=look,
            )
            for i, row in zip(chosen, new):
                last = max(np.flatnonzero(row != self.tokenizer.pad_id).tolist(), default=0)  # other rows may go on
                found[i] = Continuation(self._cut(row, stop, ends), row, tuple(at for at in joined if at <= last))
        return [found[i] for i in range(len(prompts))]

    def _aug(self, augment: bool) -> Augmentation:
        return self.aug if augment else self.plain

    def _augments(self, augment: bool) -> bool:
        return augment and self.coprocessor is not None

    def _coprocessor(self, augment: bool, delay: int | None) -> decoding.Coprocessor:
        """Who writes latents: nobody, this model's coprocessor after a delay, or the one beside it."""
        if not self._augments(augment):
            return decoding.Absent()
        if delay is not None:
            return decoding.Delayed(lambda cache, text: decoding.latents(self.params, cache, text, aug=self.aug), delay)
        assert self.coprocessor_mesh is not None, "checked"
        return Beside(self.params_beside, self.aug_beside, self.coprocessor_mesh, self.mesh)

    def _ids(self, text: Prompt, what: str) -> list[int]:
        """Token ids of a text, without BOS; ids are checked and stay what they are."""
        if isinstance(text, str):
            return self.tokenizer.encode(text)
        ids = arguments.token_ids(what, text, "text or a list of token ids")
        V = self.decoder.config.vocab_size
        for id_ in ids:
            if not 0 <= id_ < V:
                raise UserError(f"{what}: token {id_}, the vocabulary has {V}: expected 0 to {V - 1}")
        return ids

    def _prompt(self, prompt: Prompt, what: str) -> list[int]:
        ids = self._ids(prompt, what)
        if not isinstance(prompt, str) and not ids:
            raise UserError(f"{what}: holds no token, not even BOS")
        return [self.tokenizer.bos_id, *ids] if isinstance(prompt, str) else ids

    def _check_length(self, what: str, prompt: int, new: int) -> None:
        if prompt + new > self.max_length:
            found = f"{prompt} tokens and {new} after them are more than max_length={self.max_length}"
            raise UserError(f"{what}: {found}; shorten it, or raise max_length")

    def _batches(self, keys: Sequence[tuple[int, int]], size: Callable[[tuple[int, int]], int]) -> Iterator[list[int]]:
        """Indices of rows with keys (continuations, length), alike ones together, at most `size(key)` at a time."""
        order = sorted(range(len(keys)), key=lambda i: keys[i], reverse=True)  # the largest first: they must fit
        while order:
            count = size(keys[order[0]])
            yield order[:count]
            order = order[count:]

    def _pad(self, rows: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        """Rows [B, T] padded to one of few shapes, and their lengths [B]: 0 for those that only fill the batch."""
        shards = math.lcm(*(mesh_lib.row_shards(mesh) for mesh in (self.mesh, self.coprocessor_mesh) if mesh))
        length = np.zeros(_round_up(_power(len(rows)), shards), np.int32)
        length[: len(rows)] = [len(row) for row in rows]
        padded = np.full((len(length), _bucket(int(max(length)))), self.tokenizer.pad_id, np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return self._rows(padded), self._rows(length)

    def _rows(self, x: Any) -> jax.Array:
        return jax.device_put(x, mesh_lib.rows(self.mesh))

    def _cut(self, tokens: np.ndarray, stop: Sequence[str], ends: Set[int]) -> str:
        """The text of new tokens, up to the first of `ends` among them and the first stop string."""
        text = self.tokenizer.decode(list(itertools.takewhile(lambda token: token not in ends, tokens.tolist())))
        found = [at for at in (text.find(s) for s in stop) if at >= 0]
        return text[: min(found)] if found else text

    def _check_augmented(self) -> None:
        if self.coprocessor is None:
            raise UserError("this model has no coprocessor, so no latents")

    def _check_tokens(self, tokens_BT: Any) -> jax.Array:
        tokens = _integers("tokens", tokens_BT, "[B, T]")
        V = self.decoder.config.vocab_size
        _check_range("tokens", tokens, V - 1, f"the vocabulary has {V}")
        if len(tokens) > 1 and len(tokens) % (shards := mesh_lib.row_shards(self.mesh)):
            raise UserError(f"tokens: {len(tokens)} rows do not split over {shards} devices")
        return jnp.asarray(tokens, jnp.int32)

    def _check_positions(self, tokens: jax.Array, positions_BM: Any, ahead: int) -> jax.Array:
        B, T = tokens.shape
        positions = _integers("positions", positions_BM, f"[{B}, M]")
        if len(positions) != B:
            raise UserError(f"positions: {len(positions)} rows, expected {B}, as many as tokens")
        if ahead >= T:
            raise UserError(f"ahead={ahead}: the text has {T} tokens, expected less")
        after = f", and {ahead} are to follow" if ahead else ""
        _check_range("positions", positions, T - 1 - ahead, f"the text has {T} tokens{after}")
        return jnp.asarray(positions, jnp.int32)


def check_options(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, every: int, delay: int | None, batch_size: int
) -> None:
    """Raises UserError for an option of `AugmentedLM.continuations` that is out of range."""
    arguments.whole("max_new_tokens", max_new_tokens, 1)
    if not arguments.number("temperature", temperature) >= 0:
        raise UserError(f"temperature={temperature}: expected at least 0")
    arguments.whole("top_k", top_k, 0, arguments.INT64)
    if not 0 < arguments.number("top_p", top_p) <= 1:
        raise UserError(f"top_p={top_p}: expected above 0, at most 1")
    arguments.whole("batch_size", batch_size, 1)
    check_rhythm(every, 0 if delay is None else delay)


def check_rhythm(every: int, delay: int) -> None:
    """Raises UserError unless latents join, late by `delay`, before `every` tokens are there and new ones are due."""
    arguments.whole("every", every, 0)
    arguments.whole("delay", delay, 0)
    if every and delay >= every:
        raise UserError(f"delay={delay}: expected less than every={every}")


def check_attention(attention: str) -> None:
    """Raises UserError for a form of attention that there is not."""
    forms = ("auto", *FORMS)
    if attention not in forms:
        raise UserError(f"attention={attention!r}: expected one of {', '.join(forms)}")


def _stops(stop: str | Sequence[str]) -> list[str]:
    """Returns stop strings as a list."""
    found = [stop] if isinstance(stop, str) else arguments.several("stop", stop)
    for text in found:
        if not isinstance(text, str) or not text:
            raise UserError(f"stop: holds {text!r}, expected texts that are not empty")
    return found


def _seeds(seed: int | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Returns a seed for each of `count` prompts, and what tells those apart that share it."""
    if np.ndim(seed) == 0:
        one = arguments.whole("seed", seed, 0, arguments.INT64)
        return [(one, i) for i in range(count)]
    seeds = arguments.several("seed", seed)
    found = [(arguments.whole(f"seed[{i}]", one, 0, arguments.INT64), 0) for i, one in enumerate(seeds)]
    if len(found) != count:
        raise UserError(f"{count} prompts, but {len(found)} seeds")
    return found


def _integers(name: str, value: Any, shape: str) -> np.ndarray:
    """Returns an array of two axes; `shape` tells a user which ones."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{name}: rows of unequal length, expected integers {shape}") from None
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: {array.dtype} of shape {array.shape}, expected integers {shape}")
    return array


def _check_range(name: str, array: np.ndarray, high: int, why: str) -> None:
    """Raises UserError that names the first number of an array which is not one from 0 to `high`."""
    wrong = np.argwhere((array < 0) | (array > high))
    if len(wrong):
        at = ", ".join(map(str, wrong[0]))
        raise UserError(f"{name}[{at}]={array[tuple(wrong[0])]}: {why}, expected 0 to {high}")


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _bucket(n: int) -> int:
    """A length in tokens rounded up, by a fourth at most once it is past 128: so that few are ever compiled."""
    return _round_up(n, max(32, _power(n) // 8))


def _place(mesh: Mesh, params: Params, dtype: Any, axes: Any = PARAM_AXES) -> Params:
    """Parameters where they lie on a mesh. Cast where they are, each by itself: they need not fit one device."""
    shardings = mesh_lib.parameters(mesh, params, axes)
    return jax.tree.map(lambda x, s: jax.device_put(x.astype(dtype, copy=False), s), params, shardings)
