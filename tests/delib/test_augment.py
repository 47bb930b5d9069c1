"""All traces together against each one alone; who sees whom, by gradients.

Two packed rows, grouped queries, windows smaller than the text; one trace at a document's start and
two near an end.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import optax
import pytest
import small
from two_rows import AT, SEGMENT, START, TOKENS, WEIGHTS, A, L, M, T, document_of

from latent_delib.delib import augment
from latent_delib.delib import traces as traces_lib
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.step import Objective, TrainState, train_step
from latent_delib.nn import transformer
from latent_delib.nn.transformer import Transformer


def setup(config, placement, method="cache_augmentation"):
    aug = Augmentation(Transformer(config), method, L, placement, loss_chunk=5)
    return aug, {"decoder": small.decoder(config), "coprocessor": small.coprocessor(config, L)}


@partial(jax.jit, static_argnums=0)
def loss_and_nll(aug, params, tokens_BT, segment_BT, at_BM, delay_BM):
    """Returns loss, -log p of ahead tokens [B, M, A], weights; one program for each placement."""
    total = augment.loss(aug, params, tokens_BT, segment_BT, at_BM, A, delay_BM)
    text = augment.read_text(aug, params, tokens_BT, segment_BT)
    traces = aug.lay_out(tokens_BT, segment_BT, at_BM, A, delay_BM)
    out, _ = augment.decode(
        aug, params, augment.write_latents(aug, params, text, traces), text.cache, traces
    )
    return total, (augment.nll(aug, params, out, traces.targets), traces.weights)


def test_what_needs_more_of_the_text_than_its_cache():
    """The outputs, or a fast gradient of the cache."""

    def needs_outputs(**options):
        return Augmentation(Transformer(small.GEMMA), **options).needs_outputs

    found = {method for method in METHODS if needs_outputs(method=method)}
    assert found == {"decoder", "last_layer", "joint", "unified", "feedback"}
    assert needs_outputs(distill=0.5)


NO_DELAY = np.zeros(AT.shape, int)


def trace_nll(aug, params, tokens_BT, segment_BT, at_BM, delay_BM=NO_DELAY):
    return loss_and_nll(aug, params, tokens_BT, segment_BT, at_BM, delay_BM)[1]


def loss(aug, params, tokens_BT, segment_BT, at_BM):
    return loss_and_nll(aug, params, tokens_BT, segment_BT, at_BM, NO_DELAY)[0]


@pytest.mark.parametrize(
    "family, placement",
    [
        ("gemma", "after"),
        ("gemma", "overlay"),
        pytest.param("gemma", "before", marks=pytest.mark.slow),
        pytest.param("gemma", "shared", marks=pytest.mark.slow),
        ("gpt2", "after"),
        pytest.param("llama", "after", marks=pytest.mark.slow),
        pytest.param("gpt2", "before", marks=pytest.mark.slow),
        pytest.param("gpt2", "overlay", marks=pytest.mark.slow),
        pytest.param("llama", "before", marks=pytest.mark.slow),
        pytest.param("llama", "overlay", marks=pytest.mark.slow),
    ],
)
def test_traces_together_equal_the_naive_reading_of_each(family, placement):
    config = small.CONFIGS[family]
    aug, params = setup(config, placement)
    nll, weights = trace_nll(aug, params, TOKENS, SEGMENT, AT)
    np.testing.assert_array_equal(weights, WEIGHTS)
    for b, m in np.ndindex(AT.shape):
        expected = naive.trace_nll(
            config, params["decoder"], params["coprocessor"], *document_of(b, m), A, placement
        )
        assert len(expected) == WEIGHTS[b, m].sum()
        np.testing.assert_allclose(nll[b, m, : len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", small.TWO_AND_SLOW)
def test_latents_of_an_earlier_call(placement):
    """Written before they join; where the document begins later than that, at its first token."""
    config, delay_BM = small.GEMMA, np.array([[1, 4, 2], [3, 0, 5]])
    aug, params = setup(config, placement)
    nll, _ = trace_nll(aug, params, TOKENS, SEGMENT, AT, delay_BM)
    for b, m in np.ndindex(AT.shape):
        where = (*document_of(b, m), A, placement, "cache_augmentation", delay_BM[b, m])
        expected = naive.trace_nll(config, params["decoder"], params["coprocessor"], *where)
        np.testing.assert_allclose(nll[b, m, : len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "placement, visible",
    [("after", 3), pytest.param("overlay", 3, marks=pytest.mark.slow), ("overlay", 1)],
)
def test_latents_in_place_of_text(placement, visible):
    """The decoder does not see the text before the last tokens; the coprocessor does."""
    config = small.GEMMA
    aug, params = setup(config, placement)
    aug = dataclasses.replace(aug, visible_text=visible)
    nll, _ = trace_nll(aug, params, TOKENS, SEGMENT, AT)
    for b, m in np.ndindex(AT.shape):
        document, p = document_of(b, m)
        where = (document, p, A, placement)
        expected = naive.trace_nll(
            config,
            params["decoder"],
            params["coprocessor"],
            *where,
            hidden=max(p + 1 - visible, 0),
        )
        np.testing.assert_allclose(nll[b, m, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_that_sees_the_text_which_latents_replace():
    config = small.GEMMA
    aug, params = setup(config, "overlay")
    aug = dataclasses.replace(aug, visible_text=3, distill=0.75)
    total, count = loss(aug, params, TOKENS, SEGMENT, AT)
    decoder = params["decoder"]

    @jax.jit
    def student(params):
        text = augment.read_text(aug, params, TOKENS, SEGMENT)
        traces = aug.lay_out(TOKENS, SEGMENT, AT, A)
        z = augment.write_latents(aug, params, text, traces)
        return augment.decode(aug, params, z, text.cache, traces)[0]

    p = naive.softmax(naive.logits(config, decoder, np.array(student(params), np.float64)))
    expected = 0.0
    for b, m, a in np.argwhere(WEIGHTS):
        taught = naive.text_outputs(config, decoder, TOKENS[b], SEGMENT[b])[AT[b, m] + a]
        q, own = naive.softmax(naive.logits(config, decoder, taught)), p[b, m, a]
        nll = -np.log(own[TOKENS[b, AT[b, m] + a + 1]])
        expected += 0.75 * np.sum(q * np.log(q / own)) + 0.25 * nll
    assert count == WEIGHTS.sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("placement", ["after", pytest.param("overlay", marks=pytest.mark.slow)])
def test_visibility_by_gradients(placement):
    """Exactly zero from what a trace must not see, not zero from each thing it sees."""
    aug, params = setup(small.GEMMA, placement)
    read = jax.jit(lambda p: augment.read_text(aug, p, TOKENS, SEGMENT))(params)
    text = read.cache
    traces = aug.lay_out(TOKENS, SEGMENT, AT, A)

    def losses(k, v, change_BMLD):
        cache = text._replace(k=k, v=v)
        z = augment.write_latents(aug, params, read._replace(cache=cache), traces) + change_BMLD
        out, _ = augment.decode(aug, params, z, cache, traces)
        return jnp.sum(augment.nll(aug, params, out, traces.targets) * traces.weights, axis=-1)

    no_change = jnp.zeros((2, M, L, small.GEMMA.embed_dim))
    by_k, by_v, by_z = jax.jit(jax.jacrev(losses, argnums=(0, 1, 2)))(text.k, text.v, no_change)

    row, slot = np.arange(2), np.arange(T)
    start = np.take_along_axis(START, AT, axis=1)
    # [B, M, T], x_p included: the coprocessor reads it
    sees = (slot >= start[..., None]) & (slot <= AT[..., None])
    sees = sees[:, :, None] & (row[:, None, None, None] == row[:, None])
    assert sees.shape == (2, M, 2, T) and sees.sum() == 3 + 8 + 4 + 1 + 10 + 11
    for gradient in (by_k, by_v):  # [B, M, layers, B, T, K, H]
        np.testing.assert_array_equal(np.any(gradient, axis=(2, 5, 6)), sees)
    own = np.eye(2 * M, dtype=bool).reshape(2, M, 2, M)
    np.testing.assert_array_equal(np.any(by_z, axis=-1), np.repeat(own[..., None], L, axis=-1))


@pytest.mark.parametrize("placement", small.TWO_AND_SLOW)
def test_nothing_past_the_documents_end_matters(placement):
    """Other text after each document's end, read or predicted: bit for bit the same loss."""
    aug, params = setup(small.GEMMA, placement)
    nll, weights = trace_nll(aug, params, TOKENS, SEGMENT, AT)
    other = np.where(SEGMENT == 1, TOKENS, (TOKENS + 31) % 97)
    other_nll, other_weights = trace_nll(aug, params, other, SEGMENT, AT)
    np.testing.assert_array_equal(weights, WEIGHTS)
    np.testing.assert_array_equal(other_weights, WEIGHTS)
    unchanged = (np.take_along_axis(SEGMENT, AT, axis=1)[..., None] == 1) & (WEIGHTS == 1)
    np.testing.assert_array_equal(nll == other_nll, unchanged)


def test_a_step_trains_on_the_traces_that_are_drawn():
    """Each time other ones, and its loss is their mean over ahead tokens."""
    aug, params = setup(small.GEMMA, "overlay")
    frozen, trainable = {"decoder": params["decoder"]}, {"coprocessor": params["coprocessor"]}
    tx = optax.identity()
    objective = Objective(
        aug=aug,
        num_traces=M,
        num_ahead=A,
        dtype=jnp.float32,
    )
    step = partial(train_step, objective=objective, tx=tx)
    step, found = jax.jit(step), []
    for done in range(2):
        state = TrainState(jnp.int32(done), trainable, tx.init(trainable))
        _, metrics = step(state, frozen, {"tokens": TOKENS, "segment": SEGMENT})
        at = traces_lib.draw(jax.random.fold_in(jax.random.key(0), done), TOKENS, SEGMENT, M)
        total, tokens = loss(aug, params, TOKENS, SEGMENT, at)
        assert metrics["tokens"] == tokens
        np.testing.assert_allclose(metrics["loss"], total / tokens, rtol=1e-5)
        found.append(at)
    assert np.any(found[0] != found[1])


STEPS_END = (11, 12)
QUESTIONS = np.array(  # a document's first token, its trace, its first and its last ahead token
    [[(0, 2, 7, 8), (9, 10, 14, 15)], [(0, 3, 8, 11), (0, 9, 16, 15)]]
)


def questions():
    """Two rows whose first three traces have steps before their ahead tokens, and a fourth none."""
    tokens = np.where(np.isin(TOKENS, STEPS_END), 13, TOKENS)
    for b, m in ((0, 0), (0, 1), (1, 0)):
        first = QUESTIONS[b, m, 2]
        tokens[b, first - 2 : first] = STEPS_END
    return tokens


def test_latents_instead_of_steps():
    """The loss of each question without its steps, which the teacher alone reads; its gradient.

    The student is computed on rows without steps, the teacher by the naive reading, and the
    divergence from all logits at once.
    """
    config, tokens, distill = small.GEMMA, questions(), 0.75
    aug, params = setup(config, "after")
    plain, trained = params["decoder"], params["coprocessor"]
    rows, segment, at = np.zeros((3, T), int), np.zeros((3, T), int), np.zeros((3, 1), int)
    taught, answers = [], []
    for row, (b, m) in enumerate(((0, 0), (0, 1), (1, 0))):
        start, trace, first, last = QUESTIONS[b, m]
        answers.append(tokens[b, first : last + 1])
        short = np.concatenate([tokens[b, start : trace + 1], answers[row]])
        rows[row, : len(short)], segment[row, : len(short)], at[row] = short, 1, trace - start
        document = tokens[b, start : last + 1]
        outputs = naive.text_outputs(config, plain, document, np.zeros(len(document)))
        before = outputs[-1 - len(answers[row]) : -1]
        taught.append(naive.softmax(naive.logits(config, plain, before)))

    @jax.jit
    def student(trained):
        own = {"decoder": plain, "coprocessor": trained}
        text = augment.read_text(aug, own, rows, segment)
        traces = aug.lay_out(rows, segment, at, A)
        z = augment.write_latents(aug, own, text, traces)
        return augment.decode(aug, own, z, text.cache, traces)[0]

    def expected(trained):
        total = 0.0
        for outputs, q, answer in zip(np.array(student(trained), np.float64), taught, answers):
            p = naive.softmax(naive.logits(config, plain, outputs[0, : len(answer)]))
            nll = -np.log(p[np.arange(len(answer)), answer])
            total += np.sum(distill * np.sum(q * np.log(q / p), axis=-1) + (1 - distill) * nll)
        return total

    @partial(jax.value_and_grad, has_aux=True)
    def ours(trained):
        own = {"decoder": plain, "coprocessor": trained}
        where = (tokens, SEGMENT, QUESTIONS[..., 1], A)
        one = dataclasses.replace(aug, distill=distill)
        return augment.loss(one, own, *where, steps_end=STEPS_END)

    (total, count), gradient = jax.jit(ours)(trained)
    assert count == 2 + 2 + 4
    np.testing.assert_allclose(total, expected(trained), rtol=1e-5)
    for seed in range(3):
        direction = small.at_random(seed, trained)
        ends = [optax.tree.add_scale(trained, step, direction) for step in (1e-2, -1e-2)]
        forth, back = map(expected, ends)
        slope = optax.tree.vdot(gradient, direction)
        np.testing.assert_allclose(slope, (forth - back) / 2e-2, rtol=2e-2)


@pytest.mark.parametrize("more", [{"max_delay": 3}, {"steps_end": STEPS_END}])
def test_a_step_trains_late_latents_and_answers(more):
    aug, params = setup(small.GEMMA, "overlay")
    tokens, steps_end = questions(), more.get("steps_end", ())
    frozen, trainable = {"decoder": params["decoder"]}, {"coprocessor": params["coprocessor"]}
    tx = optax.identity()
    objective = Objective(aug, M, A, jnp.float32, seed=7, **more)
    state = TrainState(jnp.int32(0), trainable, tx.init(trainable))
    step = jax.jit(partial(train_step, objective=objective, tx=tx))
    _, metrics = step(state, frozen, {"tokens": tokens, "segment": SEGMENT})
    key = jax.random.fold_in(jax.random.key(7), 0)
    at = traces_lib.draw(key, tokens, SEGMENT, M, (), steps_end)
    delay = traces_lib.draw_delays(jax.random.fold_in(key, 1), at, more.get("max_delay", 0))
    total, count = jax.jit(augment.loss, static_argnums=(0, 5, 7, 8))(
        aug, params, tokens, SEGMENT, at, A, delay, (), steps_end
    )
    assert metrics["tokens"] == count and (delay.any() or steps_end)
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)


def test_the_plain_decoder_without_the_steps():
    """Its traces have no latents: what it makes of the question alone."""
    config, tokens = small.GEMMA, questions()
    aug, params = setup(config, "after")
    at = QUESTIONS[..., 1]
    total, count = jax.jit(augment.loss, static_argnums=(0, 5, 7, 8))(
        aug.without_latents, params, tokens, SEGMENT, at, A, 0, (), STEPS_END
    )
    expected = 0.0
    for start, trace, first, last in QUESTIONS.reshape(-1, 4)[:3]:
        b = int(last == 11)
        answer = tokens[b, first : last + 1]
        document = np.concatenate([tokens[b, start : trace + 1], answer])
        out = naive.text_outputs(config, params["decoder"], document, np.zeros(len(document)))
        before = out[-1 - len(answer) : -1]
        expected += naive.nll(config, params["decoder"], before, answer).sum()
    assert count == 2 + 2 + 4
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_the_plain_decoder_without_the_hidden_text():
    """Its traces have no latents: what it makes of the last three tokens."""
    config = small.GEMMA
    aug, params = setup(config, "after")
    short = dataclasses.replace(aug, visible_text=3).without_latents
    nll, _ = trace_nll(short, params, TOKENS, SEGMENT, AT)
    none = {"soft_tokens": np.zeros((0, config.embed_dim))}
    for b, m in np.ndindex(AT.shape):
        document, p = document_of(b, m)
        where = (config, params["decoder"], none, document, p, A, "overlay")
        expected = naive.trace_nll(*where, z=none["soft_tokens"], hidden=max(p - 2, 0))
        np.testing.assert_allclose(nll[b, m, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_without_a_coprocessor_the_decoder_is_bit_identical():
    config = small.GEMMA
    aug, params = setup(config, "after")

    @jax.jit
    def plain(decoder):
        x = transformer.embed(decoder["embedding"], TOKENS, config)
        position = jnp.arange(T) - START
        bounds = transformer.own_text(jnp.array(START))
        out, kv = Transformer(config).apply(
            {"params": decoder}, x[:, None], position[:, None], bounds
        )
        return out[:, 0], kv.k[:, :, 0], kv.v[:, :, 0]

    read = jax.jit(augment.read_text, static_argnums=0)
    expected = plain(params["decoder"])
    alone = Augmentation(Transformer(config), "decoder", 0)
    for one, tree in ((alone, {"decoder": params["decoder"]}), (aug, params)):
        found = read(one, tree, TOKENS, SEGMENT)
        for ours, theirs in zip((found.outputs, found.cache.k, found.cache.v), expected):
            np.testing.assert_array_equal(ours, theirs)


def test_a_plain_decoder_learns_what_follows_prompts_alone():
    config = small.GEMMA
    _, params = setup(config, "after")
    aug = Augmentation(Transformer(config), "decoder", 0, loss_chunk=5)
    end = (int(TOKENS[0, 2]),)
    assert np.argwhere(TOKENS == end[0]).tolist() == [[0, 2]]
    params = {"decoder": params["decoder"]}
    total, tokens = augment.loss(aug, params, TOKENS, SEGMENT, AT, A, 0, end)
    out = naive.text_outputs(config, params["decoder"], TOKENS[0, :9], np.zeros(9))
    expected = naive.nll(config, params["decoder"], out[2:-1], TOKENS[0, 3:9]).sum()
    assert tokens == 6
    np.testing.assert_allclose(total, expected, rtol=1e-5)
