"""Describes a run by plain data, and compares two runs.

A record is made from a config, from the meta of a checkpoint, or from a result. It knows neither
models nor files. All code that asks whether two runs fit together calls `Record.differences` or
`Record.require`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from latent_delib.errors import UserError

FORMAT = 1  # of a checkpoint's meta; version 0.1 wrote no number, which counts as 0

METHOD = (
    "method.name",
    "method.num_latents",
    "method.placement",
    "method.every",
    "method.visible_text",
    "method.lora_rank",
    "method.start",
    "method.coprocessor",
    "method.assistant",
    "start.fingerprint",
)
# Purpose -> the keys that two runs must agree on; "method.*" is every key of that part.
AGREE = {
    # Training goes on: same decoder, same objective, same batches.
    "resume": (
        "decoder.fingerprint",
        "start.fingerprint",
        "method.*",
        "optimizer.*",
        "seed",
        "train.batch_size",
        "data.weights",
        "data.seq_len",
    ),
    # A checkpoint is evaluated or used: same decoder, same latents.
    "evaluate": ("decoder.fingerprint", "decoder.tokenizer", *METHOD),
    # Training begins with weights of another run.
    "start": (
        "decoder.fingerprint",
        "method.name",
        "method.placement",
        "method.every",
        "method.coprocessor",
        "method.assistant",
    ),
    # An evaluation is of this checkpoint, and not of the same step of another training.
    "same_training": (
        "decoder.fingerprint",
        *METHOD,
        "method.num_traces",
        "method.num_ahead",
        "method.max_delay",
        "optimizer.*",
        "seed",
        "train.batch_size",
        "data.seq_len",
    ),
    # Two evaluations are points of one curve.
    "same_curve": (
        "decoder.fingerprint",
        *METHOD,
        "method.prompt_end",
        "method.distill",
        "data.validation",
        "evaluate.num_ahead",
        "evaluate.max_length",
        "evaluate.max_pieces",
        "evaluate.max_positions",
        "evaluate.seed",
        "evaluate.delay",
        "evaluate.swap",
        "evaluate.longer_prompt",
        "evaluate.temperature",
    ),
}
# The value that a key has in runs older than the key. A new key of `method` or `optimizer` needs
# a line here: otherwise no older run can be resumed.
BEFORE = {
    "evaluate.temperature": 1.0,
    "method.assistant": "",
    "method.coprocessor": {},
    "method.distill": 0.0,
    "method.every": 0,
    "method.lora_rank": 0,
    "method.max_delay": 0,
    "method.prompt_end": "",
    "method.start": "",
    "method.visible_text": 0,
    "optimizer.name": "adamw",
}
REMEDY = {
    "resume": "use its values, or another --workdir",
    "evaluate": "use its values, or another --workdir",
    "start": "name another checkpoint",
    "same_training": "give another --out, or remove it",
    "same_curve": "give another --out, or remove it",
}
FINGERPRINTS = (
    "decoder.fingerprint",
    "decoder.tokenizer",
    "method.assistant",
    "start.fingerprint",
)
SHORT = 12  # characters of a fingerprint that messages show

Plain = Mapping[str, Any]


class OtherRun(UserError):
    """Reports a run that does not fit another one."""


class Difference(NamedTuple):
    """Names a key that two runs do not agree on, and its value in each."""

    key: str
    here: Any
    there: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """Describes a run by plain data, as JSON holds it.

    config: every key of the run's config, nested.
    fingerprint: SHA-256 of the frozen decoder, hex; in benchmarks.json, of the decoder that was
      measured; for random weights, of the architecture and the seed.
    architecture: the fields of the decoder's TransformerConfig; empty where not known.
    data: name -> SHA-256, for "tokenizer" and, once known, for every part of the training text
      (`data.batches.Training`); empty where not known.
    step: optimizer steps done; None: nothing is trained.
    assistant: "fingerprint" and "architecture" of the assistant; empty where there is none.
    start: SHA-256 of the meta of the checkpoint that the adapters were trained on, hex; "" without
      one, and in runs of older versions.
    """

    config: Plain
    fingerprint: str
    architecture: Plain = dataclasses.field(default_factory=dict)
    data: Plain = dataclasses.field(default_factory=dict)
    step: int | None = None
    assistant: Plain = dataclasses.field(default_factory=dict)
    start: str = ""

    @classmethod
    def from_meta(cls, meta: Plain, where: str) -> "Record":
        """Reads the meta of a checkpoint, of this version or an older one.

        Raises:
          OtherRun: the meta is of a newer version.
        """
        found = meta.get("format", 0)
        if found > FORMAT:
            raise OtherRun(
                f"{where}: checkpoint format {found}, expected at most {FORMAT}; "
                "use a newer latent_delib"
            )
        data = meta["data"]["fingerprint"]
        return dataclasses.replace(cls.from_result(meta), data=data)

    @classmethod
    def from_result(cls, result: Plain) -> "Record":
        """Reads the record of a perplexity.json or benchmarks.json; its data are not known."""
        return cls(
            config=result["config"],
            fingerprint=result["fingerprint"],
            architecture=result.get("architecture", {}),
            step=result.get("step"),
            assistant=result.get("assistant", {}),
            start=result.get("start", ""),
        )

    def as_result(self, checkpoint: str | None) -> dict[str, Any]:
        """Returns the fields of a perplexity.json or benchmarks.json that identify its run.

        checkpoint: the path of the run's checkpoint; None without one.
        """
        known = {name: value for name, value in vars(self).items() if name != "data"}
        return known | {"checkpoint": checkpoint}

    def meta(self) -> dict[str, Any]:
        """Returns the record as the meta of a checkpoint, JSON."""
        data = {"seed": self.config["seed"], "fingerprint": self.data}
        return vars(self) | {"format": FORMAT, "data": data}

    def digest(self) -> str:
        """Returns the SHA-256 of `meta`, hex. Trainings that differ in anything differ in it."""
        return hashlib.sha256(json.dumps(self.meta(), sort_keys=True).encode()).hexdigest()

    def __getitem__(self, key: str) -> Any:
        """Returns the value of a dotted key: "decoder.fingerprint", or a key of the config.

        A key that the run lacks has its value of BEFORE, or None. For "decoder.tokenizer" the value
        is the SHA-256, hex; None where not known. For "method.assistant" it is the SHA-256, hex;
        "" without an assistant.
        """
        if key == "decoder.fingerprint":
            return self.fingerprint
        if key == "decoder.tokenizer":
            return self.data.get("tokenizer")
        if key == "start.fingerprint":
            return self.start
        if key == "method.assistant":
            return self.assistant.get("fingerprint", "")
        value: Any = self.config
        for part in key.split("."):
            if part not in value:
                return BEFORE.get(key)
            value = value[part]
        return value

    def differences(self, other: "Record", purpose: str) -> list[Difference]:
        """Returns every difference from another run for a purpose, a key of AGREE."""
        found = []
        for key in self._keys(other, purpose):
            here, there = self[key], other[key]
            if key == "start.fingerprint" and not (here and there):  # older runs do not know it
                continue
            if here != there:
                found.append(Difference(key, here, there))
        return found

    def require(self, other: "Record", purpose: str, where: str) -> None:
        """Raises OtherRun unless another run, found at `where`, agrees for a purpose."""
        found = self.differences(other, purpose)
        if not found:
            return
        lines = []
        for d in found:
            there, here = _short(d.key, d.there), _short(d.key, d.here)
            lines.append(f"{d.key} is {there} there, {here} here")
        raise OtherRun(f"{where}: {'; '.join(lines)}; {REMEDY[purpose]}")

    def require_evaluated(self, result: Plain, where: str) -> None:
        """Raises OtherRun unless a perplexity.json, found at `where`, is of this checkpoint.

        "training" is the checkpoint's `digest`; older results do not have it.
        """
        self.require(Record.from_result(result), "same_training", where)
        digest = self.digest()
        if result.get("training", digest) != digest:
            raise OtherRun(f"{where}: is of another training; {REMEDY['same_training']}")

    def _keys(self, other: "Record", purpose: str) -> Iterator[str]:
        """Yields the keys of a purpose, one by one."""
        for key in AGREE[purpose]:
            section, star, _ = key.partition(".*")
            if not star:
                yield key
                continue
            for name in {**other.config[section], **self.config[section]}:
                yield f"{section}.{name}"


def _short(key: str, value: Any) -> str:
    """Returns a value as a message shows it."""
    return str(value or None)[:SHORT] if key in FINGERPRINTS else repr(value)
