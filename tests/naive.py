"""The architecture and the method read once more, as plainly as possible: the oracle of the tests.

One sequence, float64 numpy, a dense visibility matrix, explicit positions, layers and heads in
loops. Nothing here comes from the package; of a configuration only the fields are read. Parameters
are nested dicts of numpy arrays.
"""

import numpy as np


def rms_norm(x, scale, eps, offset=1):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (offset + scale)


def layer_norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def frequency(i, half, base, scaling):
    """Radians a position turns pair i by; `scaling` as Llama 3.1 defines it, by wavelength."""
    f = float(base) ** (-i / half)
    if not scaling:
        return f
    factor, low, high, context = scaling
    wavelength = 2 * np.pi / f
    if wavelength * high < context:
        return f
    if wavelength * low > context:
        return f / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def rotate(x_SNH, position_S, base, scaling=()):
    """Each pair (x_i, x_{i + H/2}) is a complex number, turned by position * base^(-2i/H)."""
    half = x_SNH.shape[-1] // 2
    angle = np.outer(position_S, [frequency(i, half, base, scaling) for i in range(half)])[:, None]
    turned = (x_SNH[..., :half] + 1j * x_SNH[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def activation(name, x):
    if name == "gelu":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert name == "silu", name
    return x / (1 + np.exp(-x))


def attention(config, q_SNH, k_SKH, v_SKH, visible_SS):
    out = np.zeros_like(q_SNH)
    for n in range(config.num_heads):
        k = n // (config.num_heads // config.num_kv_heads)
        scores = capped(q_SNH[:, n] @ k_SKH[:, k].T * config.query_scale, config.attn_softcap)
        out[:, n] = softmax(np.where(visible_SS, scores, -np.inf)) @ v_SKH[:, k]
    return out


def layer_of(tree, l):
    return {
        k: layer_of(v, l) if isinstance(v, dict) else np.asarray(v[l], np.float64)
        for k, v in tree.items()
    }


def forward(config, parts, position_S, visible_SS, given=None):
    """Final-normed outputs [S, D] of one sequence.

    parts: [(weights, inputs [n, D]), ...]: runs of tokens that stand one after the other in the
    sequence, each read by weights of its own, all under one attention. A plain decoder is one part.
    given: (first, keys, values), [layers, n, K, H] each: what tokens `first`, ... have instead of
    their own, before keys are rotated.
    """
    weights, xs = [w for w, _ in parts], [np.asarray(x, np.float64) for _, x in parts]
    ends = np.cumsum([len(x) for x in xs])[:-1]
    if config.learned_positions:  # of whatever stands there: a token, a latent, a soft token
        for i, (w, at) in enumerate(zip(weights, np.split(position_S, ends))):
            xs[i] = xs[i] + np.asarray(w["positions"], np.float64)[at]
    back_SS = position_S[:, None] - position_S[None, :]

    def norm(x, w):
        if config.layer_norm:
            return layer_norm(x, w["scale"], w["bias"], config.norm_eps)
        return rms_norm(x, w["scale"], config.norm_eps, config.norm_offset)

    def turned(x):
        return x if config.learned_positions else rotate(x, position_S, *rope)

    def bias(w, name):
        return w[f"{name}_bias"] if config.other_bias else 0

    for l in range(config.num_layers):
        is_local = config.layer_pattern[l % len(config.layer_pattern)] == "local"
        seen_SS = visible_SS & (back_SS < config.window) if is_local else visible_SS
        rope = (config.local_rope_base,) if is_local else (config.rope_base, config.rope_scaling)
        layers = [layer_of(w["layers"], l) for w in weights]

        heads = {"q": [], "k": [], "v": []}
        for w, x in zip(layers, xs):
            normed = norm(x, w["pre_attn_norm"])
            for name, run in heads.items():
                y = np.einsum("sd,dnh->snh", normed, w["attn"][name])
                if config.qkv_bias:
                    y = y + w["attn"][f"{name}_bias"]
                if config.qk_norm and name != "v":
                    y = norm(y, w["attn"][f"{name}_norm"])
                run.append(y)
        q, k, v = (np.concatenate(run) for run in heads.values())
        if given:
            first, keys, values = given
            k[first : first + len(keys[l])] = keys[l]
            v[first : first + len(values[l])] = values[l]
        out = attention(config, turned(q), turned(k), v, seen_SS)

        for i, (w, attended) in enumerate(zip(layers, np.split(out, ends))):
            y = np.einsum("snh,nhd->sd", attended, w["attn"]["out"]) + bias(w["attn"], "out")
            xs[i] = xs[i] + (norm(y, w["post_attn_norm"]) if config.post_norms else y)
            mlp, normed = w["mlp"], norm(xs[i], w["pre_mlp_norm"])
            y = normed @ mlp["up"] + bias(mlp, "up")
            if config.plain_mlp:
                y = activation(config.activation, y)
            else:
                y = activation(config.activation, normed @ mlp["gate"]) * y
            y = y @ mlp["down"] + bias(mlp, "down")
            xs[i] = xs[i] + (norm(y, w["post_mlp_norm"]) if config.post_norms else y)
    finals = []
    for w, x in zip(weights, xs):
        own = {name: np.asarray(leaf, np.float64) for name, leaf in w["final_norm"].items()}
        finals.append(norm(x, own))
    return np.concatenate(finals)


def embed(config, decoder, tokens):
    return scaled(config, np.asarray(decoder["embedding"], np.float64)[tokens])


def scaled(config, rows):
    return rows * np.sqrt(config.embed_dim) if config.scale_embeddings else rows


def logits(config, decoder, x):
    table = decoder["head"] if config.untied_head else decoder["embedding"]
    return capped(x @ np.asarray(table, np.float64).T, config.final_softcap)


def nll(config, decoder, x, targets):
    return -np.log(softmax(logits(config, decoder, x)))[np.arange(len(targets)), targets]


def text_outputs(config, decoder, tokens, document):
    """The plain decoder over one packed row; `document` numbers each token's document."""
    index = np.arange(len(tokens))
    visible = (document[:, None] == document[None, :]) & (index[None, :] <= index[:, None])
    position = index - np.array([np.flatnonzero(document == d)[0] for d in document])
    return forward(config, [(decoder, embed(config, decoder, tokens))], position, visible)


def causal(n):
    return np.tri(n, dtype=bool)


# Placement -> by how much the text after L latents moves on, and whether x_p is read again.
SHIFT = {"after": lambda L: L, "before": lambda L: L, "overlay": lambda L: 0, "shared": lambda L: 0}
REREADS = {"after": False, "before": True, "overlay": True, "shared": True}


def latent_position(p, L, placement):
    offset = {
        "after": np.arange(1, L + 1),
        "before": np.arange(L),
        "overlay": np.arange(1 - L, 1),
        "shared": np.zeros(L, int),
    }
    return np.maximum(p + offset[placement], 0)


def written(config, decoder, coprocessor, text, q, placement, method="cache_augmentation", L=None):
    """Latents [L, D] after token q of a document: one dense sequence of both models."""
    if method == "cartridge":
        return np.zeros((L, config.embed_dim))
    soft = np.asarray(coprocessor["soft_tokens"], np.float64)
    L = L or len(soft)
    position = np.concatenate([np.arange(q + 1), latent_position(q, L, placement)])
    visible = causal(len(position))
    if method == "feedback":
        x = np.concatenate([text[: q + 1], scaled(config, soft)])
        for _ in range(L - 1):
            n = len(x)
            out = forward(config, [(coprocessor, x)], position[:n], visible[:n, :n])
            x = np.concatenate([x, out[-1:]])
        return x[q + 1 :]
    if method == "static_tokens":
        return scaled(config, soft)
    # all of it by the coprocessor, over what the decoder made of the text
    if method == "last_layer":
        read = forward(config, [(decoder, text[: q + 1])], np.arange(q + 1), causal(q + 1))
        return forward(config, [(coprocessor, np.concatenate([read, soft]))], position, visible)[
            q + 1 :
        ]
    for i in range(1, len(soft)) if method == "sequential" else ():
        before = forward(
            config, [(decoder, text[: q + 1]), (coprocessor, soft)], position, visible
        )[q + i]
        soft = np.concatenate([soft[:i], soft[i : i + 1] + before, soft[i + 1 :]])
    return forward(config, [(decoder, text[: q + 1]), (coprocessor, soft)], position, visible)[
        q + 1 :
    ]


def trace_nll(
    config,
    decoder,
    coprocessor,
    document,
    p,
    num_ahead,
    placement,
    method="cache_augmentation",
    delay=0,
    z=None,
    L=None,
    hidden=0,
):
    """-log p of up to `num_ahead` tokens after document[p], given document[: p + 1] and latents.

    Latents were written `delay` tokens before, or are `z` [L, D]. The coprocessor's call is one
    dense sequence; the decoder's is another: text, latents, text again. There, latents and what
    follows them do not see the first `hidden` tokens.
    """
    L = L or len(coprocessor["soft_tokens"])
    kept = p if REREADS[placement] else p + 1
    shift = SHIFT[placement](L)
    text, q = embed(config, decoder, document[: p + num_ahead]), max(p - delay, 0)
    targets = document[p + 1 : p + 1 + num_ahead]
    if method == "inserted":
        return nll(
            config,
            decoder,
            inserted(config, decoder, coprocessor, text, p, placement)[: len(targets)],
            targets,
        )
    if z is None:
        z = written(config, decoder, coprocessor, text, q, placement, method, L)
    x = np.concatenate([text[:kept], z, text[kept:]])
    position = [
        np.arange(kept),
        latent_position(p, L, placement),
        np.arange(kept, len(text)) + shift,
    ]
    given = (kept, coprocessor["keys"], coprocessor["values"]) if method == "cartridge" else None
    visible = causal(len(x))
    visible[kept:, :hidden] = False
    out = forward(config, [(decoder, x)], np.concatenate(position), visible, given)
    # from the last latent on, or from x_p where that follows the latents
    predicting = out[p + L :][: len(targets)]
    return nll(config, decoder, predicting, targets)


def recurring(config, decoder, soft, document, p, every):
    """Outputs from document[p] on, with a group of latents before it and each `every`-th token on.

    A latent has the position of the token that follows it. All are one dense sequence.
    """
    text = embed(config, decoder, document)
    x, position, tokens = [], [], []
    for at, token in enumerate(text):
        if at >= p and (at - p) % every == 0:
            x += list(scaled(config, np.asarray(soft, np.float64)))
            position += [at] * len(soft)
        tokens.append(len(x))
        x.append(token)
        position.append(at)
    out = forward(config, [(decoder, np.array(x))], np.array(position), causal(len(x)))
    return out[tokens[p:]]


def inserted(config, decoder, coprocessor, text, p, placement):
    """Outputs from x_p on where the latents are keys and values.

    In one dense sequence the text after the latents sees the coprocessor's own tokens. x_p stands
    in it twice: as the coprocessor reads it, and after the latents.
    """
    L = len(coprocessor["soft_tokens"])
    shift = SHIFT[placement](L)
    parts = [
        (decoder, text[: p + 1]),
        (coprocessor, coprocessor["soft_tokens"]),
        (decoder, text[p:]),
    ]
    position = [np.arange(p + 1), latent_position(p, L, placement), np.arange(p, len(text)) + shift]
    visible = causal(p + 1 + L + len(text) - p)
    visible[p + 1 + L :, p] = False  # not the x_p before the latents
    return forward(config, parts, np.concatenate(position), visible)[p + 1 + L :]
