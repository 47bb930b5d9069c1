"""A coprocessor's folder: `coprocessor.json` and `model.safetensors`.

coprocessor.json holds {"format": "latent_delib coprocessor 1", "method", "num_latents",
"placement", "step", "fingerprint": of the decoder it belongs to, "architecture": {fields of
TransformerConfig}}. The tensors are "soft_tokens" [L, D] and, under the names and in the axes that
a Hugging Face decoder of the family has, its layers and final norm
("model.layers.0.self_attn.q_proj.weight", ...): a coprocessor has no token table.
"""

import json
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine import files
from latent_delib.nn.sizes import TransformerConfig, checked
from latent_delib.nn.transformer import TABLES, Params
from latent_delib.weights import folder, names, tensors
from latent_delib.weights.tensors import TensorFile

FORMAT = "latent_delib coprocessor 1"
FILE = "coprocessor.json"
SOFT_TOKENS = "soft_tokens"
FIELDS = {
    "method": str,
    "num_latents": int,
    "placement": str,
    "step": int,
    "fingerprint": str,
    "architecture": dict,
}


def save(out: Path, fields: dict[str, Any], config: TransformerConfig, tree: Params) -> None:
    """Writes a coprocessor's folder, whole or not at all.

    Args:
      out: the folder.
      fields: FIELDS without the architecture.
      config: the coprocessor's architecture.
      tree: its parameters.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in folder.by_name(tree).items()}
    found = names.tensors(config, "huggingface")
    body = [t for t in found if t.leaf in leaves]  # pause tokens have none
    entries = {SOFT_TOKENS: (leaves[SOFT_TOKENS].shape, leaves[SOFT_TOKENS].dtype)}
    entries |= {t.name: (t.shape, leaves[t.leaf].dtype) for t in body}

    def chunks():
        yield leaves[SOFT_TOKENS]
        for t in body:
            leaf = leaves[t.leaf]
            yield t.to_theirs(leaf if t.layer is None else leaf[t.layer])

    with files.whole(out) as partial:
        tensors.write(partial / "model.safetensors", entries, chunks(), {"format": "pt"})
        fields = {"format": FORMAT, **fields, "architecture": config.to_dict()}
        (partial / FILE).write_text(json.dumps(fields, indent=2) + "\n")


def load(where: Path) -> tuple[dict[str, Any], Params]:
    """Reads the fields of a coprocessor's folder, and its parameter tree, numpy.

    Raises:
      UserError: not such a folder, or tensors that do not fit its architecture.
    """
    fields = folder.read_json(where / FILE)
    if fields.get("format") != FORMAT:
        raise UserError(f"{where / FILE}: format is {fields.get('format')!r}, expected {FORMAT!r}")
    for key, kind in FIELDS.items():
        checked(key, fields.get(key), kind, str(where / FILE))
    config = TransformerConfig.from_dict(fields["architecture"], str(where / FILE))
    file = TensorFile(where / "model.safetensors")
    soft = (fields["num_latents"], config.embed_dim)
    found = file.shapes.get(SOFT_TOKENS)
    if found not in (soft, (1, config.embed_dim)):  # one vector may stand for all
        raise UserError(f"{file.path}: {SOFT_TOKENS} is {found}, expected {soft}")
    layers: dict[str, list[np.ndarray]] = {}
    if len(file.shapes) > 1:
        rest = {name: shape for name, shape in file.shapes.items() if name != SOFT_TOKENS}
        for t in names.match(rest, config, "huggingface", str(file.path), without=TABLES):
            layers.setdefault(t.leaf, []).append(t.to_ours(file.read(t.name)))
    leaves = {SOFT_TOKENS: file.read(SOFT_TOKENS)}
    for leaf, parts in layers.items():
        leaves[leaf] = np.stack(parts) if leaf.startswith("layers.") else parts[0]
    return fields, flax.traverse_util.unflatten_dict(leaves, sep=".")
