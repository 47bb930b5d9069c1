"""Coprocessors of another shape than the decoder's, which read or write through learned maps.

Such a coprocessor has either a size of its own, or the size of an assistant (another pretrained
decoder). Arguments and results are those of the functions in `delib.coprocessor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from latent_delib.delib.coprocessor import (
    Reading,
    body,
    init_from_decoder,
    rotated,
    write_in_one_pass,
)
from latent_delib.delib.traces import Traces
from latent_delib.nn import transformer
from latent_delib.nn.products import einsum
from latent_delib.nn.transformer import Params

if TYPE_CHECKING:
    from latent_delib.delib.augment import Augmentation

# Logical axes of the map to the decoder's width, and of all maps of `init_resized`.
OUT_AXES = {"latents_out": (None, "embed")}
MAP_AXES = OUT_AXES | {
    "keys_in": ("layers", None, None, "heads", None),
    "values_in": ("layers", None, None, "heads", None),
}


def init_resized(key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
    """Starts from random layers of the coprocessor's own shape.

    The maps from the decoder's cache, and to its width, are random too.
    """
    theirs = aug.decoder.config
    ours = aug.models.coprocessor.config
    layers_key, soft_key, keys_key, values_key, out_key = jax.random.split(key, 5)
    heads = (theirs.num_kv_heads, theirs.head_dim, ours.num_kv_heads, ours.head_dim)
    fan_in = theirs.num_kv_heads * theirs.head_dim
    return body(transformer.init(layers_key, ours)) | {
        "soft_tokens": _normal(soft_key, ours.embed_dim, aug.num_latents, ours.embed_dim),
        "keys_in": _normal(keys_key, fan_in, ours.num_layers, *heads),
        "values_in": _normal(values_key, fan_in, ours.num_layers, *heads),
        "latents_out": _latents_out(out_key, aug),
    }


def init_from_assistant(key: jax.Array, assistant: Params, aug: Augmentation) -> Params:
    """Starts from an assistant's own layers, and a random map to the decoder's width.

    The map keeps the mean square of its inputs, so the latents begin as large as those of a
    coprocessor that starts from the decoder. A smaller map would have larger gradients, because
    each decoder layer norms its inputs.
    """
    tree = init_from_decoder(key, assistant, aug)
    return tree | {"latents_out": _latents_out(jax.random.fold_in(key, 1), aug)}


def _normal(key: jax.Array, fan_in: int, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) * fan_in**-0.5


def _latents_out(key: jax.Array, aug: Augmentation) -> jax.Array:
    """Draws a map from the coprocessor's width to the decoder's, [d, D]."""
    width = aug.models.coprocessor.config.embed_dim
    return _normal(key, width, width, aug.decoder.config.embed_dim)


def write_through_maps(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Writes latents with a coprocessor of another depth, other heads and another width.

    Each of its layers reads one layer of the decoder through a linear map. The layers that are read
    are evenly spaced from the first to the last. Keys are rotated back before they are mapped, so
    that a map does not depend on the position.
    """
    theirs = aug.decoder.config
    ours = aug.models.coprocessor.config
    cache = reading.cache
    tree = params["coprocessor"]
    source = np.linspace(0, theirs.num_layers - 1, ours.num_layers).round().astype(int)
    k = rotated(cache.k[source], -cache.position, theirs, source)
    k = einsum("lBTKH,lKHkh->lBTkh", k, tree["keys_in"].astype(k.dtype))
    k = rotated(k, cache.position, ours, range(ours.num_layers))
    v = einsum("lBTKH,lKHkh->lBTkh", cache.v[source], tree["values_in"].astype(k.dtype))
    reading = reading._replace(cache=cache._replace(k=k, v=v))
    z_BMLd = write_in_one_pass(aug, params, reading, traces)
    return _mapped_out(params, z_BMLd)


def write_by_assistant(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    traces: Traces,
) -> jax.Array:
    """Writes latents with a coprocessor that reads an assistant's cache, through a linear map.

    The latents enter the decoder as in SoftCoT (Xu et al. 2025). The coprocessor reads a whole
    cache, as in Cache-to-Cache (Fu et al. 2025), and not a prompt for the assistant.
    """
    assert reading.assistant is not None, "the assistant has not read the text"
    reading = reading._replace(cache=reading.assistant)
    z_BMLd = write_in_one_pass(aug, params, reading, traces)
    return _mapped_out(params, z_BMLd)


def _mapped_out(params: Params, z_BMLd: jax.Array) -> jax.Array:
    """Returns latents in the decoder's width."""
    map_dD = params["coprocessor"]["latents_out"].astype(z_BMLd.dtype)
    return einsum("BMLd,dD->BMLD", z_BMLd, map_dD)
