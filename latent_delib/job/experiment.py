"""From a config to what a job works on: architecture, mesh, augmentation, decoder; and the checks that need no data."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib import lora
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.job.checks import check
from latent_delib.machine import checkpoint
from latent_delib.machine.checkpoint import Checkpoints
from latent_delib.nn import transformer
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.sizes import TransformerConfig, differences
from latent_delib.nn.transformer import Params, Transformer
from latent_delib.weights import folder

CORPUS_TOKENIZER = Path(__file__).parents[1] / "data" / "corpus" / "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what follows from it.

    decoder: the decoder's folder; None for random weights. fingerprint: SHA-256 of that decoder, hex. start: workdir
    and step of the coprocessor that training begins with, or None.
    """

    config: ConfigDict
    aug: Augmentation
    mesh: Mesh
    dtype: Any
    tokenizer: Tokenizer
    decoder: Path | None
    fingerprint: str
    start: tuple[str, int] | None

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued or evaluated here."""
        method = self.config.method.to_dict()
        keys = ("name", "num_latents", "placement", "lora_rank", "start", "coprocessor")
        identity = {"fingerprint": self.fingerprint, **{f"method.{k}": method[k] for k in keys}}
        return json.loads(json.dumps(identity))  # as a checkpoint tells it: JSON has no tuples

    def check_same(self, meta: dict[str, Any], where: str) -> None:
        """Raises UserError unless a checkpoint's meta is of this decoder and this method."""
        for key, here in self.identity().items():
            there = meta.get(key)
            if there != here:
                raise UserError(
                    f"{where} was trained with {_short(key, there)}, this config has {_short(key, here)}: "
                    f"use the same {'decoder' if key == 'fingerprint' else 'method'}, or another --workdir"
                )


def _short(key: str, value: Any) -> str:
    """Returns KEY=VALUE; of a fingerprint what a job prints of it as it starts."""
    return f"a decoder with fingerprint {str(value)[:12]}" if key == "fingerprint" else f"{key}={value}"


def tokenizer_path(config: ConfigDict) -> Path:
    """The tokenizer's file that a config means."""
    name, decoder = config.decoder.tokenizer, config.decoder.path
    if name == "packaged" or (not name and not decoder):
        return CORPUS_TOKENIZER
    return Path(name) if name else folder.tokenizer_path(folder.locate(decoder))


def read(config: ConfigDict, devices: Sequence[Any] | None = None) -> Experiment:
    """Checks a config and builds what it describes on `devices`, by default all there are; loads no weights.

    Raises:
      UserError: the first thing found wrong, by key.
    """
    check(config)
    if config.decoder.path:
        decoder = folder.locate(config.decoder.path)
        architecture, fingerprint = folder.read_config(decoder), folder.fingerprint(decoder)
        if fields := config.decoder.architecture.to_dict():
            wanted = dataclasses.asdict(architecture) | fields
            wanted = TransformerConfig.from_dict(wanted, "config.decoder.architecture")
            if differing := differences(architecture, wanted):
                raise UserError(f"config.decoder.architecture: {decoder} has {'; '.join(differing)}")
    else:
        decoder, fields = None, config.decoder.architecture.to_dict()
        if not fields:
            raise UserError("config.decoder.path is empty: expected a decoder folder, or config.decoder.architecture")
        architecture = TransformerConfig.from_dict(fields, "config.decoder.architecture")
        random = json.dumps([architecture.to_dict(), config.seed], sort_keys=True)
        fingerprint = hashlib.sha256(random.encode()).hexdigest()
    tokenizer = Tokenizer(tokenizer_path(config))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"config.decoder.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} pieces, "
            f"the decoder only {architecture.vocab_size} rows"
        )
    mesh = mesh_lib.make(config.mesh, devices)
    changed = config.method.coprocessor.to_dict()
    coprocessor = build.coprocessor_config(architecture, changed) if changed else None
    for of, key in itertools.product(
        filter(None, (architecture, coprocessor)), ("num_heads", "num_kv_heads", "ffn_dim")
    ):
        if getattr(of, key) % mesh.shape["tensor"]:
            raise UserError(
                f"config.mesh.tensor={mesh.shape['tensor']} does not divide {key}={getattr(of, key)}: "
                "expected a divisor of it"
            )
    for key, traces in (
        ("method.num_traces", config.method.num_traces),
        ("evaluate.positions", min(config.evaluate.positions, config.evaluate.max_length)),
    ):
        if traces % mesh.shape["traces"]:
            raise UserError(
                f"config.mesh.traces={mesh.shape['traces']} does not divide config.{key}={traces}: "
                "expected a divisor of it"
            )

    def transformer_of(architecture: TransformerConfig) -> Transformer:
        return build.transformer(architecture, mesh, config.compute.remat, config.compute.attention)

    aug = Augmentation(
        transformer_of(architecture),
        config.method.name,
        config.method.num_latents,
        config.method.placement,
        config.compute.loss_chunk,
        coprocessor and transformer_of(coprocessor),
    )
    start = build.split_start(config.method.start) if config.method.start else None
    return Experiment(config, aug, mesh, jnp.dtype(config.compute.dtype), tokenizer, decoder, fingerprint, start)


def load_decoder(exp: Experiment, dtype: Any) -> Params:
    """The decoder's weights in `dtype`, each placed on the mesh as it is read; random ones without a folder."""
    architecture = exp.aug.transformer.config
    shapes = folder.shapes(architecture)
    shardings = mesh_lib.parameters(exp.mesh, shapes, PARAM_AXES)
    if exp.decoder is None:

        def start(key: jax.Array) -> Params:
            return jax.tree.map(lambda x: x.astype(dtype), transformer.init(key, architecture))

        return jax.jit(start, out_shardings=shardings)(jax.random.key(exp.config.seed))
    return folder.load(exp.decoder, architecture, dtype, shardings)


def init_trainable(exp: Experiment) -> Any:
    """The function (key, decoder, start) -> trainable tree of the config's method, float32; start: a coprocessor."""
    aug, rank = exp.aug, exp.config.method.lora_rank

    def init(key: jax.Array, decoder: Params, start: Params | None = None) -> Params:
        tree = METHODS[aug.method].init(key, decoder, aug.models, aug.num_latents)
        tree |= {} if start is None else {"coprocessor": start}
        if rank:
            tree = {
                room: _adapters(jax.random.fold_in(key, i), tree[room], rank) for i, room in enumerate(sorted(tree))
            }
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return init


def _adapters(key: jax.Array, tree: Params, rank: int) -> Params:
    """What is trained of a decoder or coprocessor under low-rank adaptation: adapters, and all that is not its body."""
    rest = {name: leaf for name, leaf in tree.items() if name not in ("layers", "final_norm", *transformer.TABLES)}
    return rest | ({"layers": lora.init(key, tree["layers"], rank)} if "layers" in tree else {})


def open_start(exp: Experiment) -> Checkpoints:
    """Where the coprocessor is that training begins with; its meta is checked, no weights are read.

    Raises:
      UserError: no such checkpoint, or one of another decoder or method, or of adapters.
    """
    given = f"config.method.start={exp.config.method.start}"
    try:
        checkpoints, _, meta = checkpoint.open_for_reading(*exp.start)
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix(f'{exp.start[0]}: ')}") from None
    for key, here in (exp.identity() | {"method.lora_rank": 0, "method.start": ""}).items():
        there = meta.get(key)
        if there != here:
            raise UserError(f"{given} was trained with {_short(key, there)}, expected {_short(key, here)}")
    return checkpoints


def load_start(exp: Experiment, dtype: Any) -> Params:
    """The coprocessor that training begins with, in `dtype`, each array read to where it lies on the mesh.

    Raises:
      UserError: as `open_start`; or it is damaged.
    """
    with contextlib.closing(open_start(exp)) as checkpoints:
        found = checkpoints.restore_newest({"coprocessor": start_shapes(exp)}, step=exp.start[1])
    return jax.tree.map(lambda x: x.astype(dtype), found.trainable["coprocessor"])


def start_shapes(exp: Experiment) -> Params:
    """The shapes of a whole coprocessor of the config's method, with their shardings."""

    def init(key: jax.Array, decoder: Params) -> Params:
        return METHODS[exp.aug.method].init(key, decoder, exp.aug.models, exp.aug.num_latents)["coprocessor"]

    shapes = jax.eval_shape(init, jax.random.key(0), folder.shapes(exp.aug.transformer.config))
    return placed(shapes, mesh_lib.parameters(exp.mesh, shapes, PARAM_AXES))


def trainable_shapes(exp: Experiment) -> Params:
    """The shapes of the trainable tree, with their shardings."""
    decoder = folder.shapes(exp.aug.transformer.config)
    shapes = jax.eval_shape(init_trainable(exp), jax.random.key(0), decoder)
    return placed(shapes, mesh_lib.parameters(exp.mesh, shapes, PARAM_AXES))


def placed(shapes: Any, shardings: Any, dtype: Any = None) -> Any:
    """Shapes that carry these shardings, in `dtype` where given."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, shardings)
