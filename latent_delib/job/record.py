"""What a run is, as plain data, and the one comparison of two runs.

A record is made from a config, from the meta of a checkpoint, or from a result. It knows neither models nor files.
Everything that asks "does this fit?" asks `Record.differences`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from latent_delib.errors import UserError

FORMAT = 1  # of a checkpoint's meta; 0: without a number, until version 0.1

METHOD = ("name", "num_latents", "placement", "lora_rank", "start", "coprocessor")
EVALUATION = (
    "num_ahead",
    "max_length",
    "max_pieces",
    "max_positions",
    "seed",
    "delay",
    "swap",
    "longer_prompt",
)
# Purpose -> the keys that two runs must agree on. "method.*" is every key of that part of the config.
AGREE = {
    # Training goes on: same decoder, same objective, same batches.
    "resume": (
        "decoder.fingerprint",
        "method.*",
        "optimizer.*",
        "seed",
        "train.batch_size",
        "data.weights",
        "data.seq_len",
    ),
    # A checkpoint is evaluated or used: same decoder, same latents.
    "evaluate": ("decoder.fingerprint", "decoder.tokenizer", *(f"method.{key}" for key in METHOD)),
    # Training begins with another run's coprocessor, which must be whole.
    "start": ("decoder.fingerprint", *(f"method.{key}" for key in METHOD)),
    # Two evaluations stand on one curve.
    "compare": (
        "decoder.fingerprint",
        *(f"method.{key}" for key in METHOD),
        "data.validation",
        *(f"evaluate.{key}" for key in EVALUATION),
    ),
}
WHOLE = {"method.lora_rank": 0, "method.start": ""}  # of a coprocessor that others begin with
# What a key was before it existed.
BEFORE = {"method.coprocessor": {}, "method.lora_rank": 0, "method.max_delay": 0, "method.start": ""}
REMEDY = {
    "resume": "use that, or another --workdir",
    "evaluate": "use the same, or another --workdir",
    "start": "name another checkpoint",
    "compare": "give another --out, or remove it",
}
SHORT = 12  # characters of a fingerprint that are shown

Plain = Mapping[str, Any]


class Difference(NamedTuple):
    """A key that two runs do not agree on, and its value in each."""

    key: str
    here: Any
    there: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run is.

    config: every key of its config, nested. fingerprint: SHA-256 of the frozen decoder, hex. architecture: the fields
    of its TransformerConfig; empty where not known. data: the fingerprint of its training text, as
    `data.batches.fingerprint` makes it; empty where not known. step: optimizer steps done; None: nothing trained.
    """

    config: Plain
    fingerprint: str
    architecture: Plain = dataclasses.field(default_factory=dict)
    data: Plain = dataclasses.field(default_factory=dict)
    step: int | None = None

    @classmethod
    def from_meta(cls, meta: Plain, where: str) -> "Record":
        """Reads the meta of a checkpoint, of this version or an older one.

        Raises:
          UserError: it is of a newer version.
        """
        if (found := meta.get("format", 0)) > FORMAT:
            raise UserError(f"{where}: checkpoint format {found}, expected at most {FORMAT}; use a newer latent_delib")
        return cls(meta["config"], meta["fingerprint"], meta["architecture"], meta["data"]["fingerprint"], meta["step"])

    @classmethod
    def from_result(cls, result: Plain) -> "Record":
        """Reads the record of a perplexity.json or benchmarks.json."""
        return cls(result["config"], result["fingerprint"], step=result["step"])

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint stores of this record, JSON."""
        return {
            "format": FORMAT,
            "step": self.step,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "data": {"seed": self.config["seed"], "fingerprint": self.data},
        }

    @property
    def method(self) -> Plain:
        """Returns the method's part of the config, with the keys that an older version did not have."""
        before = {key.removeprefix("method."): value for key, value in BEFORE.items()}
        return before | dict(self.config["method"])

    @property
    def tokenizer(self) -> str | None:
        """Returns the SHA-256 of the tokenizer, hex; None where not known."""
        return self.data.get("tokenizer")

    def __getitem__(self, key: str) -> Any:
        """Returns a value by its dotted key: "decoder.fingerprint", "decoder.tokenizer", or a key of the config.

        None: the run has no such key.
        """
        if key == "decoder.fingerprint":
            return self.fingerprint
        if key == "decoder.tokenizer":
            return self.tokenizer
        value: Any = self.config
        for part in key.split("."):
            if part not in value:
                return BEFORE.get(key)
            value = value[part]
        return value

    def differences(self, other: "Record", purpose: str) -> list[Difference]:
        """Compares this run with another for a purpose, a key of AGREE; returns every difference, this run's first."""
        found = []
        for key in self._keys(other, purpose):
            here = WHOLE[key] if purpose == "start" and key in WHOLE else self[key]
            there = other[key]
            if here != there:
                found.append(Difference(key, here, there))
        return found

    def require(self, other: "Record", purpose: str, where: str) -> None:
        """Raises UserError unless another run, found at `where`, agrees with this one on all that a purpose needs."""
        found = self.differences(other, purpose)
        if found:
            listed = "; ".join(f"{d.key} is {_short(d, d.there)} there, {_short(d, d.here)} here" for d in found)
            raise UserError(f"{where}: {listed}; {REMEDY[purpose]}")

    def _keys(self, other: "Record", purpose: str) -> Iterator[str]:
        for key in AGREE[purpose]:
            room, star, _ = key.partition(".*")
            if star:  # a key that came later has no value in an older run, and cannot differ
                yield from (f"{room}.{name}" for name in other.config[room])
            else:
                yield key


def _short(difference: Difference, value: Any) -> str:
    """Returns a value as a message shows it."""
    if difference.key in ("decoder.fingerprint", "decoder.tokenizer"):
        return str(value)[:SHORT]
    return repr(value)
