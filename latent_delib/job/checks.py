"""Checks everything in a config that needs neither a file nor a device."""

import math
from typing import Any

from ml_collections import ConfigDict

from latent_delib.data import questions
from latent_delib.data.rows import check_data
from latent_delib.data.sources import has_steps
from latent_delib.delib.methods import METHODS
from latent_delib.delib.optimizer import OPTIMIZERS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.job.build import ATTENTION, DTYPES
from latent_delib.machine import arguments
from latent_delib.machine.command_line import keys_of, value_of
from latent_delib.nn.transformer import REMAT

ONE_OF = {
    "method.name": METHODS,
    "method.placement": PLACEMENTS,
    "optimizer.name": OPTIMIZERS,
    "compute.dtype": DTYPES,
    "compute.remat": REMAT,
    "compute.attention": ATTENTION,
    "decoder.export_dtype": DTYPES,
}
AT_LEAST = {  # the smallest value allowed; 0 for all other numbers
    "method.num_latents": 1,
    "method.num_traces": 1,
    "method.num_ahead": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.accumulation": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.keep": 1,
    "compute.cpu_devices": 1,
    "compute.loss_chunk": 1,
    "evaluate.num_ahead": 1,
    "evaluate.max_length": 2,
    "evaluate.batch_size": 1,
    "evaluate.positions": 1,
}


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value that is out of range or does not fit the others."""
    _check_values(config)
    check_data(config.data)
    for key, allowed in ONE_OF.items():
        value = value_of(config, key)
        if value not in allowed:
            raise UserError(f"config.{key}={value!r}: expected one of {', '.join(sorted(allowed))}")
    _check_optimizer(config.optimizer)
    for section in ("method", "optimizer", "train", "compute", "evaluate"):
        for name, value in config[section].items():
            low = AT_LEAST.get(f"{section}.{name}", 0)
            if isinstance(value, int | float) and value < low:
                raise UserError(f"config.{section}.{name}={value}: expected at least {low}")
    arguments.whole("config.seed", config.seed, 0, arguments.SEED)
    _check_train(config.train)
    _check_method(config.method)
    _check_distill(config.method)
    _check_evaluate(config)
    _check_trace_length(config)


def check_steps(config: ConfigDict) -> None:
    """Raises UserError where latents replace the steps and a source of text has no steps.

    A dry run reads no text, so it does not call this function.
    """
    if not replaces_steps(config.method):
        return
    fields = ["sources"]
    if config.train.validate_every:
        fields.append("validation")
    for field in fields:
        for source in config.data[field]:
            if not has_steps(source):
                raise UserError(
                    f"config.method.distill={config.method.distill:g}: no questions with steps in "
                    f"{source!r} of config.data.{field}; expected qa_steps:..., or "
                    "config.method.distill=0"
                )


def replaces_steps(m: ConfigDict) -> bool:
    """Tells whether latents replace the written steps of questions, which the teacher reads."""
    return m.distill > 0 and not m.visible_text


def _check_values(config: ConfigDict) -> None:
    """Raises UserError for None, infinity, NaN, and integers of 2**31 or more, except seeds."""
    for key in keys_of(config):
        value = value_of(config, key)
        if value is None:
            raise UserError(f"config.{key}=None: expected a value")
        if isinstance(value, int) and value >= 2**31 and key.split(".")[-1] != "seed":
            raise UserError(f"config.{key}={value}: expected less than 2**31")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value}: expected a finite number")


def _check_optimizer(o: ConfigDict) -> None:
    for key in ("learning_rate", "clip_norm", "eps"):
        if not o[key] > 0:
            raise UserError(f"config.optimizer.{key}={o[key]}: expected more than 0")
    for key in ("b1", "b2"):
        if not 0 <= o[key] < 1:
            raise UserError(f"config.optimizer.{key}={o[key]}: expected at least 0 and less than 1")
    if not 0 <= o.final_fraction <= 1:
        raise UserError(f"config.optimizer.final_fraction={o.final_fraction}: expected 0 to 1")


def _check_train(t: ConfigDict) -> None:
    if t.profile_at and t.profile_at + 3 > t.steps:
        raise UserError(
            f"config.train.profile_at={t.profile_at}: three steps are profiled after it, expected "
            f"config.train.steps={t.steps} to be at least {t.profile_at + 3}"
        )
    if t.validate_every % t.log_every:
        raise UserError(
            f"config.train.validate_every={t.validate_every}: expected a multiple of "
            f"config.train.log_every={t.log_every}"
        )
    if t.batch_size % t.accumulation:
        raise UserError(
            f"config.train.accumulation={t.accumulation}: expected a divisor of "
            f"config.train.batch_size={t.batch_size}"
        )


def _check_method(m: ConfigDict) -> None:
    """Raises UserError for a setting that the method's entry in METHODS does not allow."""
    row = METHODS[m.name]
    if m.coprocessor and not row.own_size:
        others = [name for name in METHODS if METHODS[name].own_size]
        raise UserError(
            f"config.method.coprocessor: a coprocessor of method {m.name!r} has the decoder's "
            f"size; leave it empty, or set config.method.name={' or '.join(others)}"
        )
    if m.assistant and not row.has_assistant:
        others = [name for name in METHODS if METHODS[name].has_assistant]
        raise UserError(
            f"config.method.assistant={m.assistant}: method {m.name!r} has no assistant; leave it "
            f"empty, or set config.method.name={' or '.join(others)}"
        )
    if row.has_assistant and not m.assistant:
        raise UserError(
            f"config.method.assistant is empty: method {m.name!r} needs another decoder's folder, "
            "of the same vocabulary"
        )
    if m.start and m.lora_rank and row.trains_decoder:
        raise UserError(
            f"config.method.start={m.start}: adapters of a decoder can be added only to the one in "
            "config.decoder.path, not to a checkpoint; leave it empty, or set "
            "config.method.lora_rank=0"
        )
    if m.lora_rank and not row.has_matrices:
        raise UserError(
            f"config.method.lora_rank={m.lora_rank}: method {m.name!r} trains no matrix; leave it 0"
        )
    if m.lora_rank and (row.starts_random or row.own_size) and not m.start:
        raise UserError(
            f"config.method.lora_rank={m.lora_rank}: a coprocessor of method {m.name!r} does not "
            "start from the decoder's layers; expected the checkpoint of a trained coprocessor in "
            "config.method.start, to add adapters to it"
        )
    if m.max_delay and row.writes_latents:
        _require_movable("method.max_delay", m.max_delay, m.name)
    if m.visible_text and (not row.writes_latents or row.recurs):
        why = "has no latents" if not row.writes_latents else "has latents that recur"
        raise UserError(
            f"config.method.visible_text={m.visible_text}: method {m.name!r} {why}; leave it 0"
        )
    if row.writes_keys and not PLACEMENTS[m.placement].reread:
        fit = [name for name in sorted(PLACEMENTS) if PLACEMENTS[name].reread]
        raise UserError(
            f"config.method.placement={m.placement!r}: method {m.name!r} has no output that could "
            f"predict the next token; expected one of {', '.join(fit)}"
        )
    _check_groups(m)


def _check_groups(m: ConfigDict) -> None:
    """Raises UserError where `method.every` does not fit the method, or latents move the text."""
    row = METHODS[m.name]
    if m.every and not row.recurs:
        raise UserError(
            f"config.method.every={m.every}: latents of method {m.name!r} join once; leave it 0"
        )
    if not row.recurs:
        return
    if row.reads_text or row.writes_keys:
        raise UserError(
            f"config.method.name={m.name!r}: latents that recur must be vectors that do not depend "
            "on the text; the method's row says otherwise"
        )
    if not m.every:
        raise UserError(
            f"config.method.every=0: latents of method {m.name!r} recur; expected the number of "
            "ahead tokens between them, at least 1"
        )
    if m.every >= m.num_ahead:
        raise UserError(
            f"config.method.every={m.every}: expected less than config.method.num_ahead="
            f"{m.num_ahead}; with as many, no latents recur in training"
        )
    L = m.num_latents
    fit = [
        name
        for name, place in PLACEMENTS.items()
        if not place.shift(L) and not any(place.latents(L))
    ]
    if m.placement not in fit:
        raise UserError(
            f"config.method.placement={m.placement!r}: where latents of method {m.name!r} recur, "
            f"the text between them keeps its positions; expected {' or '.join(fit)}"
        )


def _check_distill(m: ConfigDict) -> None:
    """Raises UserError where `method.distill` lacks a frozen decoder that has read more."""
    if not m.distill:
        return
    given = f"config.method.distill={m.distill:g}"
    row = METHODS[m.name]
    if m.distill > 1:
        raise UserError(f"{given}: expected at least 0 and at most 1")
    if not row.writes_latents or row.trains_decoder:
        raise UserError(
            f"{given}: method {m.name!r} trains the decoder; expected a method that writes latents "
            "for a frozen one, which is the teacher"
        )
    if replaces_steps(m) and m.prompt_end != questions.PROMPT_END:
        raise UserError(
            f"{given}: config.method.prompt_end={m.prompt_end!r}, expected "
            f"{questions.PROMPT_END!r}, so that latents replace the steps after it, or "
            "config.method.visible_text above 0"
        )


def _require_movable(key: str, value: Any, method: str) -> None:
    """Raises UserError unless the method's latents can join later, or join another text."""
    if not METHODS[method].reads_text:
        raise UserError(
            f"config.{key}={value}: method {method!r} writes no latents that depend on a text; "
            "leave it out"
        )
    if METHODS[method].writes_keys:
        raise UserError(
            f"config.{key}={value}: method {method!r} writes keys, which depend on their position, "
            "so they can neither join later nor join another text; leave it out"
        )


def _check_evaluate(config: ConfigDict) -> None:
    e = config.evaluate
    longest = e.max_length - 2
    if e.delay > longest:
        raise UserError(
            f"config.evaluate.delay={e.delay}: expected at most {longest}, so that latents are "
            f"written within pieces of evaluate.max_length={e.max_length}"
        )
    if e.longer_prompt > longest:
        raise UserError(
            f"config.evaluate.longer_prompt={e.longer_prompt}: expected at most {longest}, so that "
            f"something is left of pieces of evaluate.max_length={e.max_length}"
        )
    if not e.temperature:
        raise UserError(f"config.evaluate.temperature={e.temperature}: expected more than 0")
    if e.swap and e.batch_size < 2:
        raise UserError(
            f"config.evaluate.swap: evaluate.batch_size={e.batch_size}, expected at least 2"
        )
    for key in ("swap", "delay"):
        if e[key]:
            _require_movable(f"evaluate.{key}", e[key], config.method.name)


def _check_trace_length(config: ConfigDict) -> None:
    """Raises UserError if a row is too short for the ahead tokens, traces or visible text."""
    m = config.method
    length = config.data.seq_len
    if not METHODS[m.name].writes_latents:
        return
    for key, most, why in (
        ("num_ahead", length - 1, "the tokens after the first in"),
        ("num_traces", length - 1, "the positions in"),
        ("visible_text", length - 1, "so that it hides some of"),
        ("max_delay", length - 2, "so that latents are written within"),
    ):
        if m[key] > most:
            raise UserError(
                f"config.method.{key}={m[key]}: expected at most {most}, {why} a row of "
                f"config.data.seq_len={length} tokens"
            )
