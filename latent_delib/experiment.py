"""From a config to what a job works on: architecture, mesh, augmentation, decoder; and the checks that need no data."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_delib import checkpoint, models
from latent_delib import mesh as mesh_lib
from latent_delib.checkpoint import Checkpoints
from latent_delib.data.rows import check_data
from latent_delib.delib import lora
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.nn import transformer
from latent_delib.nn.attention_forms import FORMS
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.sizes import TransformerConfig, differences
from latent_delib.nn.transformer import REMAT, Params, Transformer
from latent_delib.tokenizer import Tokenizer
from latent_delib.weights import folder

VECTORS_ALONE = ("pause_tokens", "static_tokens")  # methods that train no matrix, and whose latents read no text
CORPUS_TOKENIZER = Path(__file__).parent / "data" / "corpus" / "tokenizer.model"


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
        random = json.dumps([dataclasses.asdict(architecture), config.seed], sort_keys=True)
        fingerprint = hashlib.sha256(random.encode()).hexdigest()
    tokenizer = Tokenizer(tokenizer_path(config))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"config.decoder.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} pieces, "
            f"the decoder only {architecture.vocab_size} rows"
        )
    mesh = mesh_lib.make(config.mesh, devices)
    changed = config.method.coprocessor.to_dict()
    coprocessor = models.coprocessor_config(architecture, changed) if changed else None
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
        return models.transformer(architecture, mesh, config.compute.remat, config.compute.attention)

    aug = Augmentation(
        transformer_of(architecture),
        config.method.name,
        config.method.num_latents,
        config.method.placement,
        config.compute.loss_chunk,
        coprocessor and transformer_of(coprocessor),
    )
    start = models.split_start(config.method.start) if config.method.start else None
    return Experiment(config, aug, mesh, jnp.dtype(config.compute.dtype), tokenizer, decoder, fingerprint, start)


def check(config: ConfigDict) -> None:
    """Checks that need nothing but the config."""

    def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
        if value not in allowed:
            raise UserError(f"config.{key}={value!r}: expected one of {', '.join(sorted(allowed))}")

    def at_least(low: float, **values: float) -> None:
        for key, value in values.items():
            if not value >= low:
                raise UserError(f"config.{key.replace('__', '.')}={value}: expected at least {low}")

    m, t, o, e = config.method, config.train, config.optimizer, config.evaluate
    _check_numbers(config)
    check_data(config.data)
    one_of("method.name", m.name, METHODS)
    one_of("method.placement", m.placement, PLACEMENTS)
    one_of("compute.dtype", config.compute.dtype, ("bfloat16", "float32"))
    one_of("decoder.export_dtype", config.decoder.export_dtype, ("bfloat16", "float32"))
    one_of("compute.remat", config.compute.remat, REMAT)
    one_of("compute.attention", config.compute.attention, ("auto", *FORMS))
    at_least(1, method__num_latents=m.num_latents, method__num_traces=m.num_traces, method__num_ahead=m.num_ahead)
    at_least(1, train__steps=t.steps, train__batch_size=t.batch_size, train__accumulation=t.accumulation)
    at_least(1, train__log_every=t.log_every, train__checkpoint_every=t.checkpoint_every, train__keep=t.keep)
    at_least(0, method__lora_rank=m.lora_rank, method__max_delay=m.max_delay, evaluate__delay=e.delay)
    at_least(1, evaluate__num_ahead=e.num_ahead, evaluate__batch_size=e.batch_size, evaluate__positions=e.positions)
    at_least(2, evaluate__max_length=e.max_length)
    at_least(1, compute__loss_chunk=config.compute.loss_chunk)
    at_least(0, optimizer__soft_token_learning_rate=o.soft_token_learning_rate, optimizer__warmup_steps=o.warmup_steps)
    at_least(0, optimizer__weight_decay=o.weight_decay)
    at_least(0, evaluate__longer_prompt=e.longer_prompt)
    at_least(0, evaluate__max_pieces=e.max_pieces, evaluate__max_positions=e.max_positions, evaluate__seed=e.seed)
    at_least(0, train__keep_every=t.keep_every, train__keep_best=t.keep_best, train__max_bad_steps=t.max_bad_steps)
    at_least(0, train__profile_at=t.profile_at)
    for key in ("learning_rate", "clip_norm", "eps"):
        if not o[key] > 0:
            raise UserError(f"config.optimizer.{key}={o[key]}: expected more than 0")
    for key in ("b1", "b2"):
        if not 0 <= o[key] < 1:
            raise UserError(f"config.optimizer.{key}={o[key]}: expected at least 0 and less than 1")
    if not 0 <= o.final_fraction <= 1:
        raise UserError(f"config.optimizer.final_fraction={o.final_fraction}: expected 0 to 1")
    if t.profile_at and t.profile_at + 3 > t.steps:
        raise UserError(
            f"config.train.profile_at={t.profile_at}: expected at most {t.steps - 3}, so that three steps follow it "
            f"before config.train.steps={t.steps}"
        )
    if not 0 <= config.seed < 2**63:
        raise UserError(f"config.seed={config.seed}: expected at least 0 and below 2**63")
    if t.batch_size % t.accumulation:
        raise UserError(
            f"config.train.accumulation={t.accumulation}: expected a divisor of config.train.batch_size={t.batch_size}"
        )
    if m.coprocessor and m.name != "resized":
        raise UserError(
            f"config.method.coprocessor: method {m.name!r} has no size of its own to give; "
            "leave it empty, or set config.method.name=resized"
        )
    if m.start and (METHODS[m.name].write is None or METHODS[m.name].trains_decoder):
        raise UserError(f"config.method.start={m.start}: method {m.name!r} trains no coprocessor alone; leave it empty")
    if m.lora_rank and m.name in VECTORS_ALONE:
        raise UserError(f"config.method.lora_rank={m.lora_rank}: method {m.name!r} trains no matrix; leave it 0")
    if m.lora_rank and m.name in ("from_scratch", "resized") and not m.start:
        raise UserError(
            f"config.method.lora_rank={m.lora_rank}: a coprocessor of method {m.name!r} begins at random; "
            "expected config.method.start, the trained one that the adapters are of"
        )
    if m.name == "inserted" and not PLACEMENTS[m.placement].reread:
        raise UserError(
            f"config.method.placement={m.placement!r}: method 'inserted' has no vector to predict the next token from; "
            "expected one that reads x_p again: " + ", ".join(sorted(p for p in PLACEMENTS if PLACEMENTS[p].reread))
        )
    if e.swap and m.name == "inserted":
        raise UserError(
            "config.evaluate.swap: the keys that method 'inserted' writes hold their position, so that they cannot "
            "stand in for others; leave it out"
        )
    for key, value in (("evaluate.swap", e.swap), ("evaluate.delay", e.delay), ("method.max_delay", m.max_delay)):
        if value and (m.name in VECTORS_ALONE or (m.name == "decoder" and key != "method.max_delay")):
            raise UserError(f"config.{key}={value}: method {m.name!r} writes no latents that depend on a text")
    if e.delay > e.max_length - 2:
        raise UserError(
            f"config.evaluate.delay={e.delay}: expected at most {e.max_length - 2}, so that latents are written within "
            f"pieces of evaluate.max_length={e.max_length}"
        )
    if e.swap and e.batch_size < 2:
        raise UserError(f"config.evaluate.swap: evaluate.batch_size={e.batch_size}, expected two texts at once")
    if e.longer_prompt > e.max_length - 2:
        raise UserError(
            f"config.evaluate.longer_prompt={e.longer_prompt}: expected at most {e.max_length - 2}, so that something "
            f"is left of pieces of evaluate.max_length={e.max_length}"
        )
    if METHODS[m.name].write is not None:
        if config.data.seq_len < m.num_latents + m.num_ahead:
            raise UserError(
                f"config.data.seq_len={config.data.seq_len}: expected at least {m.num_latents + m.num_ahead}, the "
                f"length of a trace: {m.num_latents} latents + {m.num_ahead} ahead tokens"
            )
        if m.num_traces >= config.data.seq_len:
            raise UserError(
                f"config.method.num_traces={m.num_traces}: expected at most {config.data.seq_len - 1}, the positions "
                f"in a row of config.data.seq_len={config.data.seq_len} tokens"
            )


def _check_numbers(config: ConfigDict, above: str = "config") -> None:
    """Raises UserError for numbers that no array has as its length, and for infinity."""
    for name, value in config.items():
        key = f"{above}.{name}"
        if isinstance(value, ConfigDict):
            _check_numbers(value, key)
        elif isinstance(value, int) and value >= 2**31 and name != "seed":
            raise UserError(f"{key}={value}: expected less than 2**31")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: expected a finite number")


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
    rest = {name: leaf for name, leaf in tree.items() if name not in ("layers", "final_norm", "embedding")}
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
