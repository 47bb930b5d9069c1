"""Checks a config: everything that needs no file and no device."""

import math
from collections.abc import Iterable

from ml_collections import ConfigDict

from latent_delib.data.rows import check_data
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.nn.attention.forms import FORMS
from latent_delib.nn.transformer import REMAT

VECTORS_ALONE = ("pause_tokens", "static_tokens")  # methods that train no matrix, and whose latents read no text


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
