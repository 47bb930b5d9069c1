"""A coprocessor's folder: `coprocessor.json`, `model.safetensors`, and `README.md`, a model card.

coprocessor.json holds
    "format"         "latent_delib coprocessor 2"
    "fingerprint"    the fingerprint of the decoder that the coprocessor belongs to
    "architecture"   the coprocessor's architecture, {fields of TransformerConfig}
    "record"         the meta of its checkpoint: its step, and the config of its training

model.safetensors holds the method's own parameters by name ("soft_tokens" [L, D], ...); these names
have no dot. It also holds the layers, the final norm and learned positions, with the names and axes
of a Hugging Face decoder of the family ("model.layers.0.self_attn.q_proj.weight", ...). A
coprocessor has no token table.
"""

import json
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from etils import epath

from latent_delib.errors import UserError
from latent_delib.machine import files
from latent_delib.nn.sizes import TransformerConfig, checked
from latent_delib.nn.transformer import BODY, TABLES, Params
from latent_delib.weights import folder, hub, locate, names, tensors
from latent_delib.weights.tensors import TensorFile

FORMAT = "latent_delib coprocessor 2"
FILE = "coprocessor.json"
PACKAGED = locate.PACKAGED / "coprocessor"
FIELDS = {"fingerprint": str, "architecture": dict, "record": dict}


def find_export(workdir: str) -> Path | None:
    """Returns the folder of an exported coprocessor; None where it is a training job's workdir.

    "packaged" comes with this package; "hf:OWNER/NAME" is on the Hugging Face Hub.
    """
    where = PACKAGED if workdir == "packaged" else hub.download(workdir)
    return where if (where / FILE).is_file() else None


def name_of(workdir: str, step: int) -> str:
    """Returns the path of a job's checkpoint, or `workdir` where it is an exported coprocessor."""
    if find_export(workdir) is not None:
        return workdir
    return str(epath.Path(workdir) / "checkpoints" / str(step))


def save(
    out: Path, fields: dict[str, Any], config: TransformerConfig, tree: Params, card: str
) -> None:
    """Writes a coprocessor's folder, whole or not at all.

    Args:
      out: the folder.
      fields: the values of FIELDS without the architecture.
      config: the coprocessor's architecture.
      tree: the coprocessor's parameters.
      card: the content of README.md.

    Raises:
      ValueError: a parameter of the layers has no name in `weights.names`.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in folder.by_name(tree).items()}
    own = [name for name in leaves if name.partition(".")[0] not in BODY]
    body: dict[str, list[names.Tensor]] = {}
    if len(own) < len(leaves):  # methods that train vectors alone have no layers
        found = [t for t in names.tensors(config, "huggingface") if t.leaf not in TABLES]
        body = names.fused(found)
        unnamed = {t.leaf for t in found} ^ (leaves.keys() - own)
        if unnamed:
            raise ValueError(
                f"no names for {sorted(unnamed)}; add them to latent_delib/weights/names.py"
            )
    entries = {name: (leaves[name].shape, leaves[name].dtype) for name in own}
    for name, parts in body.items():
        entries[name] = parts[0].shape, leaves[parts[0].leaf].dtype

    def chunks():
        yield from (leaves[name] for name in own)
        for parts in body.values():
            ours = [leaves[t.leaf][... if t.layer is None else t.layer] for t in parts]
            yield parts[0].to_theirs(ours)

    with files.atomic_folder(out) as partial:
        tensors.write(partial / "model.safetensors", entries, chunks(), {"format": "pt"})
        fields = {"format": FORMAT, **fields, "architecture": config.to_dict()}
        (partial / FILE).write_text(json.dumps(fields, indent=2) + "\n")
        (partial / "README.md").write_text(card, encoding="utf-8")


def read_fields(where: Path, step: int | None = None) -> dict[str, Any]:
    """Reads coprocessor.json; it must be of `step`, if that is given.

    Raises:
      UserError: the folder is not a coprocessor's, or of another step.
    """
    fields = files.read_json(where / FILE)
    if fields.get("format") != FORMAT:
        raise UserError(
            f"{where / FILE}: format is {fields.get('format')!r}, expected {FORMAT!r}; "
            "export it again with this version"
        )
    for key, kind in FIELDS.items():
        checked(key, fields.get(key), kind, str(where / FILE))
    found = checked("record.step", fields["record"].get("step"), int, str(where / FILE))
    if step not in (None, found):
        raise UserError(f"{where}: holds the coprocessor of step {found}, not of step {step}")
    return fields


def load(where: Path, step: int | None = None) -> tuple[dict[str, Any], Params]:
    """Reads a coprocessor's folder; returns its fields, and its parameter tree of numpy arrays.

    Raises:
      UserError: the folder is not a coprocessor's, or of another step; or its layers do not fit its
        architecture.
    """
    fields = read_fields(where, step)
    config = TransformerConfig.from_dict(fields["architecture"], str(where / FILE))
    file = TensorFile(where / "model.safetensors")
    layers: dict[str, list[np.ndarray]] = {}
    rest = {name: shape for name, shape in file.shapes.items() if "." in name}
    if rest:
        for t in names.match(rest, config, "huggingface", str(file.path), without=TABLES):
            layers.setdefault(t.leaf, []).append(t.to_ours(file.read(t.name)))
    leaves = {name: file.read(name) for name in file.shapes.keys() - rest.keys()}
    for leaf, parts in layers.items():
        leaves[leaf] = np.stack(parts) if leaf.startswith("layers.") else parts[0]
    return fields, flax.traverse_util.unflatten_dict(leaves, sep=".")
