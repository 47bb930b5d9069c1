"""The language model that a decoder and a coprocessor make."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_delib import mesh as mesh_lib
from latent_delib.data.rows import cut_pieces
from latent_delib.delib.augment import assemble
from latent_delib.delib.coprocessor import Latents
from latent_delib.delib.methods import param_axes
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.lm import batching, compiled, decoding, inputs, scoring
from latent_delib.lm.inputs import GenerationOptions, Prompt
from latent_delib.lm.load import Coprocessor, Decoder, augmentation, load_assistant, place
from latent_delib.lm.sampling import Continuation, Endings
from latent_delib.machine import arguments
from latent_delib.nn.transformer import Params

STREAMED = 4  # tokens between two pieces of a stream
Report = Callable[[int], None]  # gets the number of items done


class AugmentedLM:
    """Combines a decoder and a coprocessor; without a coprocessor it is the decoder as it is.

    Token arrays hold one document per row, starting with BOS; padding on the right changes nothing
    before it. A list of prompts may have any length. Prompts are taken `batch_size` at a time,
    similar lengths together, in few shapes that are each compiled once. Results are in the order of
    the prompts.

    Args:
      mesh: devices of the decoder and its caches (`mesh.make`); by default the first device.
      coprocessor_mesh: devices of the coprocessor alone, which then works beside the decoder
        (`delay=None`).
      max_length: the most tokens of a prompt and its continuation together. Choose it by the length
        that the decoder was trained on, and by memory. A table of learned positions lowers it to
        the tokens that fit the table, latents included.
      attention: the form of attention, as `compute.attention` of a config: "auto", a proven kernel
        or "xla"; or one of `nn.attention.forms.FORMS`.

    Raises:
      UserError: a coprocessor of another decoder, or an argument of the wrong type.
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
        inputs.check_attention(attention)
        self.decoder = decoder
        self.coprocessor = coprocessor
        self.tokenizer = decoder.tokenizer
        self.dtype = decoder.params["embedding"].dtype
        self.mesh = mesh or build.one_device()
        self.coprocessor_mesh = coprocessor_mesh
        self.plain = augmentation(decoder, None, self.mesh, attention)
        self.aug = augmentation(decoder, coprocessor, self.mesh, attention)
        self.max_length = min(arguments.whole("max_length", max_length, 2), self.aug.longest_text)
        self.params: Params = {"decoder": place(self.mesh, decoder.params, self.dtype)}
        if coprocessor is None:
            return
        self.params |= load_assistant(coprocessor, self.dtype, self.mesh)
        axes = param_axes(coprocessor.method)
        own = {"coprocessor": place(self.mesh, coprocessor.params, self.dtype, axes)}
        self.params = assemble(self.params, own)
        if coprocessor_mesh is not None:
            self.aug_beside = augmentation(decoder, coprocessor, coprocessor_mesh, attention)
            whole = self.params["coprocessor"]
            self.params_beside = {"coprocessor": place(coprocessor_mesh, whole, self.dtype, axes)}

    def __repr__(self) -> str:
        return f"AugmentedLM({self.decoder}, {self.coprocessor})"

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the plain decoder's logits, float32 [B, T, V]."""
        tokens = self.token_array(tokens_BT)
        return scoring.score_vocabulary(self.params, tokens, aug=self.aug)

    def latents(self, tokens_BT: jax.Array, positions_BM: jax.Array) -> Latents:
        """Returns latents [B, M, L, D], written after token positions[b, m] of row b.

        A method that inserts keys and values returns keys and values instead.
        """
        if self.coprocessor is None:
            raise UserError("this model has no coprocessor, so no latents")
        tokens = self.token_array(tokens_BT)
        positions = inputs.position_array(positions_BM, tokens, 0, self.mesh)
        return scoring.write_latents_at(self.params, tokens, positions, aug=self.aug)

    def ahead_logprobs(
        self,
        tokens_BT: jax.Array,
        positions_BM: jax.Array,
        ahead: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Scores the `ahead` text tokens after each position, with and without latents.

        Returns:
          log p by the decoder, and log p with latents, float32 [B, M, A] each. The second is given
          the text up to the position, its latents, and earlier ahead tokens. Without a coprocessor
          both are the decoder's.
        """
        ahead = arguments.whole("ahead", ahead, 1)
        tokens = self.token_array(tokens_BT)
        positions = inputs.position_array(positions_BM, tokens, ahead, self.mesh)
        return scoring.score_ahead(self.params, tokens, positions, aug=self.aug, ahead=ahead)

    def logprobs(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        augment: bool = True,
        batch_size: int = 16,
        progress: Report | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores a continuation of each prompt.

        Latents join at the prompt's end. A prompt is read once for up to 8 continuations.

        Args:
          augment: whether to use latents.
          progress: gets the number of continuations that are done.

        Returns:
          log p of each continuation, summed over its tokens, float32 [N]; whether each of its
          tokens is the likeliest, bool [N].
        """
        prompts = arguments.several("prompts", prompts)
        continuations = arguments.several("continuations", continuations)
        batch_size = arguments.whole("batch_size", batch_size, 1)
        if len(prompts) != len(continuations):
            raise UserError(f"{len(prompts)} prompts, but {len(continuations)} continuations")
        tails = []
        for i, tail in enumerate(continuations):
            tails.append(self._ids(f"continuations[{i}]", tail, follows=True))
        if [] in tails:
            raise UserError(f"continuations[{tails.index([])}] is empty")
        heads = []
        for i, prompt in enumerate(prompts):
            heads.append(self._head(f"prompts[{i}]", prompt, len(tails[i])))
        groups = batching.groups(heads, tails)
        sums = np.zeros(len(tails), np.float32)
        greedy = np.zeros(len(tails), bool)
        done = 0
        keys = [group.key for group in groups]
        size = partial(batching.rows_per_batch, self.mesh, batch_size)
        for chosen in batching.by_shape(keys, size):
            batch = [groups[i] for i in chosen]
            sums_BM, greedy_BM = self._score_tails(batch, tails, augment)
            for b, (_, members, _) in enumerate(batch):
                sums[members] = sums_BM[b, : len(members)]
                greedy[members] = greedy_BM[b, : len(members)]
                done += len(members)
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
        """Scores all tokens of each text after BOS; returns the sum of log p, float64 [N].

        A text longer than max_length is cut into pieces that each begin with BOS.

        Args:
          augment: whether latents join after BOS.
          every: number of tokens after which latents join again, if not 0.
          progress: gets the number of pieces that are done.
        """
        texts = arguments.several("texts", texts)
        every, _ = inputs.check_joining(every, 0, self.aug.every)
        batch_size = arguments.whole("batch_size", batch_size, 1)
        bos_id = self.tokenizer.bos_id
        pieces: list[np.ndarray] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            ids = np.array(self._ids(f"texts[{i}]", text), np.int32)
            if len(ids) and ids[0] == bos_id:
                ids = ids[1:]
            more = cut_pieces(ids, self.max_length, bos_id)
            pieces += more
            owners += [i] * len(more)
        sums = np.zeros(len(texts))
        done = 0
        aug = self.aug if augment else self.plain
        shards = mesh_lib.shards(self.mesh, "traces")
        score = partial(scoring.score_text, aug=aug, shards=shards)
        keys = [(1, len(piece)) for piece in pieces]
        size = partial(batching.rows_per_batch, self.mesh, batch_size)
        for chosen in batching.by_shape(keys, size):
            tokens, length = self._pad([pieces[p] for p in chosen])
            predicted = tokens.shape[1] - 1
            found = score(self.params, tokens, length, stretch=min(every or predicted, predicted))
            logp = np.asarray(found, np.float64)[: len(chosen)]
            np.add.at(sums, [owners[p] for p in chosen], logp)
            done += len(chosen)
            if progress:
                progress(done)
        return sums

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        **options: Any,
    ) -> list[str]:
        """Returns continuations, without the prompts; options as for `continuations`."""
        return [c.text for c in self.continuations(prompts, max_new_tokens, **options)]

    def continuations(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        augment: bool = True,
        every: int = 0,
        delay: int | None = 0,
        batch_size: int = 16,
        progress: Report | None = None,
        **sampling: Any,
    ) -> list[Continuation]:
        """Continues the prompts.

        Args:
          stop: a text ends before the first of these strings to be completed.
          seed: one seed for each prompt; or one for all, which is combined with a prompt's place.
          augment: whether latents join at the end of the prompt.
          every: number of tokens after which latents join again, if not 0.
          delay: latents join this many tokens after the text they were written for. None: they join
            when they are ready. The coprocessor then works on its own devices, and if it fails,
            decoding goes on without new latents.
          progress: gets the number of tokens that are decoded, over all prompts.
          sampling: temperature (0: the likeliest token), top_k, top_p, ...: the fields of
            `sampling.Sampler`.
        """
        options = inputs.check_options(max_new_tokens, every, delay, sampling, self.aug)
        batch_size = arguments.whole("batch_size", batch_size, 1)
        prompts = arguments.several("prompts", prompts)
        ends = Endings(self.tokenizer, stop)
        write = self._writer(options.delay) if augment else None
        keys = inputs.random_keys(seed, len(prompts))
        heads = self._heads(prompts, options.max_new_tokens)
        found: dict[int, Continuation] = {}
        shapes = [(1, len(head)) for head in heads]
        for chosen in batching.by_shape(shapes, lambda shape: batch_size):

            def stopped(new_BN: np.ndarray, rows: int = len(chosen)) -> np.ndarray:
                if progress:
                    progress(options.max_new_tokens * len(found) + new_BN.shape[1] * rows)
                return ends.seen(new_BN)

            heads_here = [heads[i] for i in chosen]
            keys_here = [keys[i] for i in chosen]
            for chunk in self._continue(heads_here, keys_here, options, write, stopped):
                new_BN, joined = chunk  # the last chunk holds all new tokens
            for b, i in enumerate(chosen):
                joined_here = tuple(one.after for one in joined if one.rows[b])
                found[i] = Continuation(ends.cut(new_BN[b]), new_BN[b], joined_here)
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        augment: bool = True,
        every: int = 0,
        delay: int | None = 0,
        **sampling: Any,
    ) -> Iterator[str]:
        """Returns an iterator over the continuation of one prompt, piece by piece as it is decoded.

        Joined, the pieces are what `generate` returns for this prompt alone. The options are those
        of `continuations`, and are checked at once.
        """
        options = inputs.check_options(max_new_tokens, every, delay, sampling, self.aug)
        ends = Endings(self.tokenizer, stop)
        write = self._writer(options.delay) if augment else None
        keys = inputs.random_keys(seed, 1)
        heads = self._heads([prompt], options.max_new_tokens)
        chunks = self._continue(heads, keys, options._replace(chunk=STREAMED), write, ends.seen)
        return ends.pieces(new_BN[0] for new_BN, _ in chunks)

    def _continue(
        self,
        heads: Sequence[Sequence[int]],
        keys: list[jax.Array],
        options: GenerationOptions,
        write: Callable | None,
        stopped: Callable[[np.ndarray], np.ndarray],
    ) -> Iterator[tuple[np.ndarray, list[decoding.Joined]]]:
        """Continues a batch of prompts, each with its own random key; see `decode_in_chunks`."""
        text, length = self._pad(heads)
        keys = keys + keys[:1] * (len(length) - len(keys))
        return decoding.decode_in_chunks(
            self.params,
            text,
            length,
            self._rows(jnp.stack(keys)),
            options,
            aug=self.aug,
            write=write,
            room=batching.bucket(options.max_new_tokens),
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            stopped=stopped,
        )

    def _writer(self, delay: int | None) -> Callable | None:
        """Returns the `write` of `decoding.decode_in_chunks`; None without a coprocessor."""
        if self.coprocessor is None:
            return None
        if delay is not None:
            return partial(compiled.write_after, self.params, aug=self.aug)
        if self.coprocessor_mesh is None:
            raise UserError("delay=None: give the coprocessor its own devices (coprocessor_mesh)")
        where = (self.params_beside, self.aug_beside, self.coprocessor_mesh, self.mesh)
        return partial(decoding.attempt, decoding.write_beside, *where)

    def _score_tails(
        self,
        batch: Sequence[batching.Group],
        tails: Sequence[list[int]],
        augment: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns each continuation's log p, and whether it is the greedy one, [B, M]."""
        text, length = self._pad([group.head for group in batch])
        shards = mesh_lib.shards(self.mesh, "traces")
        pad_id = self.tokenizer.pad_id
        tails_BMA, inside_BMA = batching.pad_tails(batch, tails, len(length), pad_id, shards)
        aug = self.aug if augment else self.plain
        logp_BMA, likeliest_BMA = scoring.score_tails(
            self.params, text, length, self._rows(tails_BMA), aug=aug
        )
        sums_BM = np.where(inside_BMA, np.asarray(logp_BMA), 0).sum(axis=2)
        return sums_BM, np.all(np.asarray(likeliest_BMA) | ~inside_BMA, axis=2)

    def _ids(self, name: str, text: Prompt, follows: bool = False) -> list[int]:
        return inputs.token_ids(name, text, self.tokenizer, self.decoder.config.vocab_size, follows)

    def _heads(self, prompts: Sequence[Prompt], new: int) -> list[list[int]]:
        """Returns the tokens of prompts, none of which may be an empty text."""
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str) and not prompt:
                raise UserError(f"prompts[{i}] is empty")
        return [self._head(f"prompts[{i}]", prompt, new) for i, prompt in enumerate(prompts)]

    def _head(self, name: str, prompt: Prompt, new: int) -> list[int]:
        """Returns the tokens of a prompt, BOS before a text; `new` more tokens must fit."""
        ids = self._ids(name, prompt)
        if isinstance(prompt, str):
            ids = [self.tokenizer.bos_id, *ids]
        if not ids:
            raise UserError(f"{name}: holds no token, not even BOS")
        inputs.check_length(name, len(ids), new, self.max_length, self.aug.longest_text)
        return ids

    def token_array(self, tokens_BT: Any) -> jax.Array:
        """Returns the tokens of texts, one per row, as an array; raises UserError for others."""
        row_shards = mesh_lib.shards(self.mesh, "batch")
        vocab_size = self.decoder.config.vocab_size
        return inputs.token_array(tokens_BT, vocab_size, row_shards, self.aug.longest_text)

    def _pad(self, rows: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        """Returns rows padded to one of few shapes, [B, T], and their lengths [B].

        Rows that only fill the batch have length 0.
        """
        multiple = mesh_lib.shards(self.mesh, "batch")
        if self.coprocessor_mesh is not None:
            multiple = math.lcm(multiple, mesh_lib.shards(self.coprocessor_mesh, "batch"))
        padded, length = batching.pad(rows, self.tokenizer.pad_id, multiple)
        return self._rows(padded), self._rows(length)

    def _rows(self, x: Any) -> jax.Array:
        return jax.device_put(x, mesh_lib.rows(self.mesh))
