"""Google DeepMind's Gemma checkpoints: orbax folders that hold only tensors.

Keys are flat ("transformer/layer_0/attn/q_einsum") or nested. Shapes do not show window, scales and
rotary bases: these are taken from the known size that fits.
"""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from latent_delib.errors import UserError, reason
from latent_delib.nn.sizes import SIZES, TransformerConfig
from latent_delib.weights.source import Source
from latent_delib.weights.tensors import DTYPES, read_dtype
from latent_delib.weights.tokenizer_files import tokenizer_writer

MARKS = ("_METADATA", "manifest.ocdbt", "checkpoint")  # every orbax folder has one of them
_VISION = ("vision_encoder/", "SigLiPFromPatches_0/", "embedder/mm_")


def open_source(where: Path, wanted: TransformerConfig | None = None) -> Source:
    """Opens an orbax folder as a source.

    Args:
      where: the folder.
      wanted: the architecture, where it is not a known size.

    Raises:
      UserError: the folder is not a readable Gemma checkpoint, or not of a known size.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        found = handler.metadata(epath.Path(where))
        leaves = jax.tree_util.tree_leaves_with_path(getattr(found, "tree", found))
        by_path = {}
        for path, leaf in leaves:
            by_path[tuple(key.key for key in path)] = leaf  # AttributeError for a list
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a readable orbax checkpoint ({reason(error)})") from None
    paths, shapes, dtypes = {}, {}, {}
    for path, leaf in by_path.items():
        name = "/".join(map(str, path)).removeprefix("params/").removeprefix("transformer/")
        name = name.removesuffix("/w")
        if name.startswith(_VISION):
            continue
        dtype = np.dtype(leaf.dtype)
        if dtype not in DTYPES.values():
            raise UserError(f"{where}: {name} is of type {dtype}, expected {', '.join(DTYPES)}")
        paths[name] = path
        shapes[name] = tuple(leaf.shape)
        dtypes[name] = read_dtype(dtype)
    config = _architecture(shapes, str(where), wanted)
    turned = set()  # gates are [2, F, D] in the larger models, [2, D, F] in the others
    for name, shape in shapes.items():
        if name.endswith("/gating_einsum") and shape == (2, config.ffn_dim, config.embed_dim):
            turned.add(name)
            shapes[name] = (2, config.embed_dim, config.ffn_dim)

    def read(name: str) -> np.ndarray:
        path = paths[name]
        item = unflatten_dict({path: np.zeros(())})
        how = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)})
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            found = handler.restore(epath.Path(where), args=args)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"{where}: {name} cannot be read ({reason(error)})") from None
        x = flatten_dict(found)[path]
        if name in turned:
            x = x.swapaxes(1, 2)
        return x.astype(dtypes[name], copy=False)

    writer = tokenizer_writer(where)
    return Source(str(where), "deepmind", config, shapes, dtypes, read, writer)


def _architecture(
    shapes: dict[str, tuple[int, ...]], where: str, wanted: TransformerConfig | None
) -> TransformerConfig:
    """Returns the wanted architecture, or the known size that fits.

    Its vocabulary has at least as many tokens as the stored token table has rows.
    """
    if wanted is not None:
        rows = shapes.get("embedder/input_embedding", (0,))[0]
        return dataclasses.replace(wanted, vocab_size=max(rows, wanted.vocab_size))

    def dims(*names: str) -> tuple[int, ...]:
        for name in names:
            if name in shapes:
                return shapes[name]
        raise UserError(f"{where}: not a Gemma checkpoint: has no {' and no '.join(names)}")

    try:
        vocab_size, width = dims("embedder/input_embedding")
        heads, _, head_dim = dims("layer_0/attn/q_einsum", "layer_0/attn/qkv_einsum")[-3:]
        kv_heads = dims("layer_0/attn/kv_einsum", "layer_0/attn/qkv_einsum")[1]
        ffn_dim = dims("layer_0/mlp/linear")[0]
    except (ValueError, IndexError):
        raise UserError(
            f"{where}: not a Gemma checkpoint: its tensors have other dimensions"
        ) from None
    matches = map(re.compile(r"layer_\d+/").match, shapes)
    layers = {m[0] for m in matches if m}
    found = {
        "num_layers": len(layers),
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_dim": ffn_dim,
        "post_norms": "layer_0/post_attention_norm/scale" in shapes,
        "qk_norm": "layer_0/attn/_key_norm/scale" in shapes,
        "scale_embeddings": True,
    }
    for size in SIZES.values():
        fits = all(getattr(size, key) == value for key, value in found.items())
        if fits and vocab_size >= size.vocab_size:
            return dataclasses.replace(size, vocab_size=vocab_size)
    raise UserError(f"{where}: no known size has {found}; give --size")
