"""Where traces stand, written out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_delib.delib import traces
from latent_delib.nn.attention.primitive import attend, within_window
from latent_delib.nn.transformer import own_text

# One row: two documents of five tokens, padding. One trace near the first one's end, one at the
# second's start.
TOKENS = jnp.arange(10, 21)[None]
SEGMENT = jnp.array([[1] * 5 + [2] * 5 + [0]])
AT = jnp.array([[3, 5]])


compiled = jax.jit(
    traces.lay_out,
    static_argnames=("num_latents", "num_ahead", "placement", "every", "visible_text"),
)


def lay_out(placement, every=0, visible_text=0):
    sizes = {"num_latents": 2, "num_ahead": 3, "every": every, "visible_text": visible_text}
    return compiled(TOKENS, SEGMENT, AT, placement=placement, **sizes)


def check(found, expected):
    """Every array of the one row, as nested lists."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.array(y)[None]), found, expected)
    assert {x.dtype for x in jax.tree.leaves(found._replace(weights=None))} == {jnp.dtype("int32")}
    assert found.weights.dtype == jnp.float32


def bounds(start, stop, width):
    """The same for all `width` queries of a trace."""
    return traces.Bounds(*([[x] * width for x in xs] for xs in (start, stop, [0, 0])))


def test_after_literally():
    expected = traces.Traces(
        latent_position=[[4, 5], [1, 2]],
        latent_bounds=bounds([0, 5], [4, 6], 2),
        position=[[4, 5, 6, 7], [1, 2, 3, 4]],
        bounds=bounds([0, 5], [4, 6], 4),
        inputs=[[14, 15], [16, 17]],
        ahead=[[4, 5, 6], [6, 7, 8]],
        targets=[[14, 15, 16], [16, 17, 18]],
        weights=[[1.0, 0, 0], [1, 1, 1]],
    )
    check(lay_out("after"), expected)


def test_overlay_literally():
    expected = traces.Traces(
        latent_position=[[2, 3], [0, 0]],  # -1 and 0, clipped to the document's start
        latent_bounds=bounds([0, 5], [4, 6], 2),
        position=[[2, 3, 3, 4, 5], [0, 0, 0, 1, 2]],
        bounds=bounds([0, 5], [3, 5], 5),
        inputs=[[13, 14, 15], [15, 16, 17]],
        ahead=[[4, 5, 6], [6, 7, 8]],
        targets=[[14, 15, 16], [16, 17, 18]],
        weights=[[1.0, 0, 0], [1, 1, 1]],
    )
    check(lay_out("overlay"), expected)


def test_latents_that_recur_literally():
    """Two latents before x_p, and two before the second token after it, at their positions."""
    order = traces.reading_order(num_latents=2, num_ahead=3, placement="shared", every=2)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6]
    expected = traces.Traces(
        latent_position=[[3, 3, 5, 5], [0, 0, 2, 2]],
        latent_bounds=bounds([0, 5], [4, 6], 4),
        position=[[3, 3, 3, 4, 5, 5, 5], [0, 0, 0, 1, 2, 2, 2]],
        bounds=bounds([0, 5], [3, 5], 7),
        inputs=[[13, 14, 15], [15, 16, 17]],
        ahead=[[4, 5, 6], [6, 7, 8]],
        targets=[[14, 15, 16], [16, 17, 18]],
        weights=[[1.0, 0, 0], [1, 1, 1]],
    )
    check(lay_out("shared", every=2), expected)


@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_ahead_tokens_behind_steps(placement):
    """The tokens behind the ending, with the positions and the view of those behind the trace."""
    at = jnp.array([[0, 5]])
    change = {"num_latents": 2, "num_ahead": 3, "placement": placement}
    near = traces.lay_out(TOKENS, SEGMENT, at, **change)
    found = traces.lay_out(TOKENS, SEGMENT, at, **change, steps_end=(11, 12))
    inputs = [[13, 14], [21, 21]]  # the second trace has no such ending behind it
    reread = [[10], [15]] if placement == "overlay" else [[], []]
    expected = near._replace(
        inputs=np.array([[*x, *y] for x, y in zip(reread, inputs)])[None],
        ahead=np.array([[3, 4, 5], [12, 13, 14]])[None],
        targets=np.array([[13, 14, 15], [20, 20, 20]])[None],
        weights=np.array([[1.0, 1, 0], [0, 0, 0]])[None],
    )
    assert found.inputs[0, 0].tolist() == expected.inputs[0, 0].tolist()
    expected = expected._replace(inputs=found.inputs)  # those without weight do not matter
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def seen(bounds, text_length):
    """Tells who weighs in `attend`: rows are all traces' tokens; columns the text, then these."""
    weights = weights_of(bounds, text_length)
    return [
        "".join(map(str, row)) for row in np.array(weights > 0, int).reshape(-1, weights.shape[-1])
    ]


@partial(jax.jit, static_argnums=1)
def weights_of(bounds, text_length):
    B, M, S = bounds.own_start.shape
    own = jnp.zeros((B, M, S, 1, text_length + M * S))
    column = text_length + jnp.arange(M * S).reshape(M, S)
    values = own.at[:, jnp.arange(M)[:, None], jnp.arange(S), 0, column].set(1.0)
    prefix = None
    if text_length:
        eye = jnp.eye(text_length, text_length + M * S)[None, :, None]
        prefix = (jnp.zeros_like(eye), eye)
    return attend(own, own, values, prefix, bounds, scale=1.0, softcap=0.0)


def literal(text):
    """One line per row; blanks only part the columns for the eye."""
    return [line.replace(" ", "") for line in text.strip().splitlines()]


def test_visibility_of_text():
    assert seen(own_text(traces.document_start(SEGMENT)), 0) == literal("""
        10000 00000 0
        11000 00000 0
        11100 00000 0
        11110 00000 0
        11111 00000 0
        00000 10000 0
        00000 11000 0
        00000 11100 0
        00000 11110 0
        00000 11111 0
        00000 00000 1
    """)


@pytest.mark.parametrize("placement", traces.PLACEMENTS)
def test_visibility_of_the_coprocessor(placement):
    assert seen(lay_out(placement).latent_bounds, 11) == literal("""
        11110 00000 0  10 00
        11110 00000 0  11 00
        00000 10000 0  00 10
        00000 10000 0  00 11
    """)


@pytest.mark.parametrize("placement", traces.PLACEMENTS)
def test_positions_do_not_decrease_along_a_trace(placement):
    """Windows rely on it: `within_window`."""
    found = compiled(TOKENS, SEGMENT, AT, num_latents=5, num_ahead=12, placement=placement)
    assert np.all(np.diff(found.position) >= 0)
    assert np.all(np.diff(found.latent_position) >= 0)


def test_visibility_after():
    assert seen(lay_out("after").bounds, 11) == literal("""
        11110 00000 0  1000 0000
        11110 00000 0  1100 0000
        11110 00000 0  1110 0000
        11110 00000 0  1111 0000
        00000 10000 0  0000 1000
        00000 10000 0  0000 1100
        00000 10000 0  0000 1110
        00000 10000 0  0000 1111
    """)


def test_visibility_overlay():
    assert seen(lay_out("overlay").bounds, 11) == literal("""
        11100 00000 0  10000 00000
        11100 00000 0  11000 00000
        11100 00000 0  11100 00000
        11100 00000 0  11110 00000
        11100 00000 0  11111 00000
        00000 00000 0  00000 10000
        00000 00000 0  00000 11000
        00000 00000 0  00000 11100
        00000 00000 0  00000 11110
        00000 00000 0  00000 11111
    """)


@pytest.mark.parametrize(
    "placement, text", [("after", "00110 00000 0"), ("before", "00100 00000 0")]
)
def test_visibility_of_the_last_two_tokens(placement, text):
    """The coprocessor sees all the text, the decoder two tokens; `before` reads the last again."""
    all_text, short = lay_out(placement), lay_out(placement, visible_text=2)
    first, second = seen(short.bounds, 11)[0], seen(short.bounds, 11)[-1]
    assert first[:11] == text.replace(" ", "")
    assert second == seen(all_text.bounds, 11)[-1]  # one token of its document is all that there is
    assert seen(short.latent_bounds, 11) == seen(all_text.latent_bounds, 11)
    jax.tree.map(np.testing.assert_array_equal, short._replace(bounds=all_text.bounds), all_text)


def test_visibility_in_a_local_layer():
    """A window of 2: what shares a position is near together."""
    position = jnp.arange(11) - traces.document_start(SEGMENT)
    marks = lay_out("overlay")
    assert seen(within_window(marks.bounds, marks.position, position, 2), 11) == literal("""
        01100 00000 0  10000 00000
        00100 00000 0  11000 00000
        00100 00000 0  11100 00000
        00000 00000 0  01110 00000
        00000 00000 0  00011 00000
        00000 00000 0  00000 10000
        00000 00000 0  00000 11000
        00000 00000 0  00000 11100
        00000 00000 0  00000 11110
        00000 00000 0  00000 00011
    """)


# Documents of 4 and 7 tokens and padding; of 1, 1, 8, 1 and 2; and one row with two usable
# positions, fewer than four.
PACKED = jnp.array(
    [[1] * 4 + [2] * 7 + [0] * 2, [1, 2] + [3] * 8 + [4] + [5] * 2, [1, 2, 3] + [4] * 3 + [0] * 7]
)
USABLE = [{0, 1, 2, 4, 5, 6, 7, 8, 9}, {2, 3, 4, 5, 6, 7, 8, 11}, {3, 4}]


def test_traces_are_distinct_sorted_and_fair():
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = np.array(jax.jit(jax.vmap(lambda key: traces.draw(key, PACKED, PACKED, 4)))(keys))
    assert drawn.dtype == np.int32 and drawn.shape == (400, 3, 4)
    for row in (0, 1):
        assert np.all(np.diff(drawn[:, row]) > 0)  # sorted and distinct
        positions, counts = np.unique(drawn[:, row], return_counts=True)
        assert set(positions) == USABLE[row]
        fair = 400 * 4 / len(USABLE[row])
        assert counts.min() > 0.8 * fair and counts.max() < 1.2 * fair
    assert np.all(drawn[:, 2] == [3, 4, 12, 12])
    np.testing.assert_array_equal(drawn[7], traces.draw(keys[7], PACKED, PACKED, 4))
    assert len(np.unique(drawn[:, 0], axis=0)) > 50


def test_delays_are_drawn_from_none_to_the_most():
    drawn = np.array(traces.draw_delays(jax.random.key(0), np.zeros((40, 50)), 3))
    assert drawn.dtype == np.int32 and drawn.shape == (40, 50)
    assert (
        np.all(np.abs(np.bincount(drawn.ravel(), minlength=5)[:4] - 500) < 90) and drawn.max() == 3
    )
    assert np.all(np.array(traces.draw_delays(jax.random.key(0), np.zeros((4, 5)), 0)) == 0)


@pytest.mark.parametrize("placement", traces.PLACEMENTS)
def test_what_is_drawn_has_an_ahead_token_and_the_rest_no_weight(placement):
    tokens = jnp.zeros_like(PACKED)
    at = traces.draw(jax.random.key(1), PACKED, PACKED, 4)
    weights = compiled(tokens, PACKED, at, num_latents=2, num_ahead=3, placement=placement).weights
    assert np.all(weights[:2, :, 0] == 1) and np.all(weights[2, :2, 0] == 1)
    assert not np.any(weights[2, 2:])
    ends = jnp.array([[3, 10, 11, 12], [0, 9, 10, 12], [0, 2, 5, 12]])  # last tokens, and padding
    assert not np.any(
        compiled(tokens, PACKED, ends, num_latents=2, num_ahead=3, placement=placement).weights
    )


def test_traces_at_the_end_of_prompts():
    """Only behind `prompt_end`, where the document goes on; what is left over has no weight."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, PACKED.shape)
    for prompt_end in ((2,), (1, 3)):
        size = len(prompt_end)
        for row, (text, segment) in enumerate(zip(tokens, np.array(PACKED))):
            fits = []
            for last in range(size - 1, len(text) - 1):
                ends = tuple(text[last + 1 - size : last + 1]) == prompt_end
                if ends and segment[last] == segment[last + 1] > 0:
                    fits.append(last)
            at = traces.draw(
                jax.random.key(row), tokens[row : row + 1], PACKED[row : row + 1], 6, prompt_end
            )
            expected = fits + [len(text) - 1] * (6 - len(fits))
            np.testing.assert_array_equal(at[0], expected)


def test_traces_before_the_end_of_steps():
    """Only where such an end follows, at the trace or later, and the document goes on behind it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, PACKED.shape)
    tokens[np.diff(PACKED, axis=1, prepend=0) != 0] = 9  # as BOS, in no ending
    ending = (1, 3)
    for row, (text, segment) in enumerate(zip(tokens.tolist(), np.array(PACKED))):
        fits = []
        for at in range(len(text) - 1):
            ends = [e for e in range(at, len(text)) if tuple(text[max(e - 1, 0) : e + 1]) == ending]
            first = (ends or [len(text)])[0] + 1
            if first < len(text) and segment[first] == segment[at] > 0:
                fits.append(at)
        drawn = traces.draw(
            jax.random.key(row), tokens[row : row + 1], PACKED[row : row + 1], 12, (), ending
        )
        expected = fits + [len(text) - 1] * (12 - len(fits))
        np.testing.assert_array_equal(drawn[0], expected)


def test_tokens_behind_the_end_of_a_prompt():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, PACKED.shape)
    tokens[np.diff(PACKED, axis=1, prepend=0) != 0] = 9  # as BOS, in no ending
    for prompt_end in ((), (2,), (1, 3)):
        found = traces.follows_prompt(jnp.array(tokens), PACKED, prompt_end)
        for row, (text, segment) in enumerate(zip(tokens.tolist(), np.array(PACKED))):
            for at in range(len(text)):
                start = int(np.flatnonzero(segment == segment[at])[0])
                read = text[start : at + 1]
                sizes = range(len(prompt_end), len(read) + 1)
                ends = [tuple(read[n - len(prompt_end) : n]) == prompt_end for n in sizes]
                assert found[row, at] == any(ends), (prompt_end, row, at)
