"""Decoding and scoring as plainly as possible: each token by a dense sequence, without a cache."""

import naive
import numpy as np

from tests.prompts import ids_of


def naive_generate(lm, prompts, count, delay=0, every=0):
    """Returns `count` greedy tokens after each prompt; arguments as in `AugmentedLM.generate`."""
    return [_continued(lm, ids_of(lm, prompt), count, delay, every) for prompt in prompts]


def _continued(lm, ids, count, delay, every):
    new = []
    for made in range(count):
        # The last latents that joined: they are of the text `delay` tokens before.
        asked = max(0, made - delay) // every * every if every else 0
        logits = naive_logits(lm, ids + new[:asked], new[asked:], delay)
        new.append(int(logits[-1].argmax()))
    return new


def naive_logits(lm, prompt, new, delay=0):
    """Returns logits after every token of prompt + new, float64.

    The prompt's latents joined after `delay` tokens of `new`; before them, logits are NaN.
    """
    config, weights = lm.decoder.config, lm.decoder.params
    tokens = np.array(prompt + new)
    x = naive.embed(config, weights, tokens)
    at = len(prompt) + delay - 1
    if lm.coprocessor is None or at >= len(tokens):
        out = naive.forward(config, [(weights, x)], np.arange(len(x)), naive.causal(len(x)))
        return naive.logits(config, weights, out)

    coprocessor = lm.coprocessor
    L, placement = coprocessor.num_latents, coprocessor.placement
    z = naive.written(config, weights, coprocessor.params, x, len(prompt) - 1, placement)
    kept = at if naive.REREADS[placement] else at + 1
    position = np.arange(len(tokens))
    position[kept:] += naive.SHIFT[placement](L)
    position = np.insert(position, kept, naive.latent_position(at, L, placement))
    visible = naive.causal(len(position))
    if lm.aug.visible_text:
        visible[kept:, : max(at + 1 - lm.aug.visible_text, 0)] = False
    out = naive.forward(config, [(weights, np.insert(x, kept, z, axis=0))], position, visible)
    # The next token comes from the last latent, or from x_at where that is read again.
    found = naive.logits(config, weights, out[at + L :])
    return np.concatenate([np.full((at, config.vocab_size), np.nan), found])


def naive_logprobs(lm, prompt, new):
    """Returns log p of each token of `new` after the prompt, float64."""
    return chosen_logprobs(naive_logits(lm, prompt, new)[len(prompt) - 1 : -1], new)


def chosen_logprobs(logits, tokens):
    """Returns log p of one token per row of logits."""
    return np.log(naive.softmax(logits))[np.arange(len(tokens)), tokens]


# Where latents recur.


def recurring_logits(lm, tokens, p):
    """Returns logits after tokens[p] and each one that follows, float64: one dense sequence."""
    config, weights = lm.decoder.config, lm.decoder.params
    soft = lm.coprocessor.params["soft_tokens"]
    out = naive.recurring(config, weights, soft, np.array(tokens), p, lm.aug.every)
    return naive.logits(config, weights, out)


def recurring_logprob(lm, tokens, p):
    """Returns log p of all tokens after tokens[p]."""
    return chosen_logprobs(recurring_logits(lm, tokens[:-1], p), tokens[p + 1 :]).sum()
