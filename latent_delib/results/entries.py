"""The lines of the tables: the figures of each model, from all its files, and its label."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from latent_delib.delib.methods import METHODS
from latent_delib.job.words import settings_in_words, text_in_words, writes_latents
from latent_delib.results.runs import Result, Runs

# Keys of a config that decide what a checkpoint holds.
TRAINING = ("seed", "optimizer", "train")
# Keys of `evaluate` that change latents, text or logits, and their values where they do not.
CONTROLS = {"swap": False, "delay": 0, "longer_prompt": 0, "temperature": 1.0}
# `labels` names the keys of these parts of a config in which entries differ.
TRAINED_BY = ("data", "optimizer", "train")
EVALUATED_BY = ("evaluate",)
# Keys that `labels` never names. `label` names them already, or they change no figure.
NOT_NAMED = {
    "data.validation",
    "data.token_files",
    "data.max_bad_records",
    "train.log_every",
    "train.validate_every",
    "train.wandb",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_every",
    "train.keep_best",
    "train.profile_at",
    "evaluate.batch_size",
    "evaluate.positions",
    *(f"evaluate.{key}" for key in CONTROLS),
}
ALONE = {"decoder": "frozen decoder", "zero_shot_cot": "zero-shot CoT"}  # nothing was trained

# What a benchmark asks: rows that differ in one of these cannot be compared.
ASKED = ("task", "data", "shots", "metric", "filter", "documents")


@dataclasses.dataclass
class Entry:
    """Holds a line of the tables: the figures of one model.

    results: the files that the figures are from, at least one.
    model: "augmented", "decoder" or "zero_shot_cot".
    delay: number of tokens by which latents come late.
    every: number of tokens after which latents are written again; 0: they are not.
    perplexity: the row of the first token ahead.
    scores: benchmark -> its row, and its file.
    """

    results: list[Result]
    model: str
    delay: int = 0
    every: int = 0
    perplexity: dict[str, Any] | None = None
    scores: dict[str, tuple[dict[str, Any], Result]] = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> Result:
        return self.results[0]

    @property
    def method(self) -> str:
        """Returns the method; "lora" if only adapters were trained, "" if there are no latents."""
        if self.model != "augmented":
            return ""
        method = self.result.method
        return "lora" if method.get("lora_rank") else method["name"]

    @property
    def trained(self) -> bool:
        """Tells whether this is a decoder without latents that was itself trained."""
        return self.model != "augmented" and _has_own_decoder(self.result)

    @property
    def latents(self) -> int:
        return self.result.method["num_latents"] if self.model == "augmented" else 0


def _has_own_decoder(result: Result) -> bool:
    """Tells whether a result is of a checkpoint that holds a decoder."""
    method = METHODS.get(result.method["name"])
    return method is not None and method.trains_decoder and bool(result.checkpoint)


def entry_of(result: Result) -> Entry:
    """Returns the entry of a perplexity.json alone."""
    model = "augmented" if writes_latents(result.method["name"]) else "decoder"
    delay = controls(result).get("delay", 0)
    return Entry([result], model, delay, perplexity=result.data["rows"][0])


def entries(runs: Runs) -> list[Entry]:
    """Collects perplexity and benchmarks of each checkpoint in one entry.

    Decoders come first, then entries by number of latents. An evaluation of another text, with a
    control, or with other figures is an entry of its own.
    """
    found: list[Entry] = []
    for result in runs.perplexity:
        _add_perplexity(found, result)
    for result in runs.benchmarks:
        for row in result.data["rows"]:
            _add_score(found, result, row)
    return sorted(found, key=lambda e: (e.model == "augmented", e.latents, e.delay, e.every))


def _add_perplexity(found: list[Entry], result: Result) -> None:
    """Adds an evaluation to the entry of the same model and figures, or as a new one."""
    new = entry_of(result)
    for entry in found:
        if _subject(entry) == _subject(new) and _evaluation(entry.result) == _evaluation(result):
            entry.results.append(result)
            return
    found.append(new)


def _add_score(found: list[Entry], result: Result, row: dict[str, Any]) -> None:
    """Adds a benchmark's row to the first entry of its model without a control, or to a new one.

    Scores of another decoder, or on other questions of the same name, have an entry of their own.
    """
    entry = Entry([result], row["model"], row.get("delay") or 0, row.get("every") or 0)
    alike = [each for each in found if _subject(each) == _subject(entry) and not is_control(each)]
    # Scores stand beside the first evaluation; further ones have other figures of perplexity.
    meant = [each for each in alike if each is alike[0] or not each.perplexity]
    fitting = [each for each in meant if _fits(each, result, row)]
    if fitting:
        entry = fitting[0]
    else:
        found.append(entry)
    if result not in entry.results:
        entry.results.append(result)
    entry.scores.setdefault(row["benchmark"], (row, result))


def _fits(entry: Entry, result: Result, row: Mapping[str, Any]) -> bool:
    """Tells whether a row of a benchmarks.json can stand beside the scores of an entry.

    Two trainings of one name may have trained different decoders. `_subject` cannot tell them
    apart, but their fingerprints differ.
    """
    for other in entry.results:
        same_kind = other.path.name == result.path.name
        if same_kind and other.data["fingerprint"] != result.data["fingerprint"]:
            return False
    score = entry.scores.get(row["benchmark"])
    return score is None or asks_the_same(row, score[0])


def asks_the_same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tells whether two rows of benchmarks.json ask the same; older files do not say all of it."""
    return all(row[key] == other[key] for key in ASKED if key in row and key in other)


def _subject(entry: Entry) -> tuple:
    """Returns the values that distinguish one model from another.

    Another training may have written a checkpoint of the same path.
    """
    result = entry.result
    decoder, checkpoint = result.data["fingerprint"], result.checkpoint
    if _has_own_decoder(result):
        # benchmarks name the decoder that was trained, perplexity the one it is compared with
        decoder = ""
    elif entry.model != "augmented":
        checkpoint = None
    trained = None
    if checkpoint:
        trained = [result.data["config"].get(key) for key in TRAINING]
    return decoder, checkpoint, trained, entry.model, entry.delay, entry.every


def _evaluation(result: Result) -> tuple:
    """Returns the values that distinguish one evaluation of a model from another."""
    return text_of(result), result.data["rows"], controls(result)


def is_control(entry: Entry) -> bool:
    """Tells whether an entry is of an evaluation that changes latents or text."""
    return entry.perplexity is not None and bool(controls(entry.result))


def text_of(result: Result) -> str:
    """Returns the names of the validation sources of a perplexity.json."""
    return ", ".join(result.record["data.validation"] or ())


def controls(result: Result) -> dict[str, Any]:
    """Returns the controls of a perplexity.json that are set; older files do not have all."""
    found = {}
    for key, ordinary in CONTROLS.items():
        value = result.record[f"evaluate.{key}"]
        if value not in (None, ordinary):
            found[key] = value
    return found


def controls_in_words(evaluated: Mapping[str, Any]) -> list[str]:
    """Says in words what a config's `evaluate` does to the latents, the text or the logits."""
    words = []
    if evaluated.get("delay"):
        words.append(f"delay {evaluated['delay']}")
    if evaluated.get("swap"):
        words.append("latents of another text")
    if evaluated.get("longer_prompt"):
        lost = evaluated["longer_prompt"]
        words.append(f"without the first {lost} tokens that the decoder reads")
    if evaluated.get("temperature", 1.0) != 1.0:
        words.append(f"all logits divided by {evaluated['temperature']:g}")
    return words


def label(entry: Entry) -> str:
    """Says in words what an entry is; the number of latents has a column of its own."""
    result, method = entry.result, entry.result.method
    done = controls(result) | {"delay": 0}  # an entry's own delay is below
    if entry.model != "augmented" and not entry.trained:
        words = [ALONE.get(entry.model, entry.model)]
        if entry.perplexity:
            words += text_in_words(method) + controls_in_words(done)
        return ", ".join(words)
    words = _trained_decoder(entry) if entry.trained else [method["name"].replace("_", " ")]
    words += settings_in_words(method)
    if "num_ahead" in method and not entry.trained:
        words.append(f"{method['num_ahead']} ahead tokens")
    if result.step:
        words.append(f"step {result.step:,}")
    if "seed" in result.data["config"]:
        words.append(f"seed {result.data['config']['seed']}")
    if entry.every:
        words.append(f"latents every {entry.every} tokens")
    if entry.delay:
        words.append(f"delay {entry.delay}")
    return ", ".join(words + controls_in_words(done))


def _trained_decoder(entry: Entry) -> list[str]:
    name = entry.result.method["name"]
    words = ["zero-shot CoT"] if entry.model == "zero_shot_cot" else []
    words.append("trained decoder")
    if writes_latents(name):
        words.append(f"of {name}, without its latents")
    return words


def labels(entries: Sequence[Entry], of_perplexity: bool = True) -> list[str]:
    """Says in words what each entry is.

    Entries with the same words are told apart by the decoder, and by the keys of the config in
    which they differ.

    of_perplexity: also name the text, unless all have the same, and the keys of `evaluate`.
    """
    evaluated = [entry for entry in entries if of_perplexity and entry.perplexity]
    texts = {text_of(entry.result) for entry in evaluated}
    words = []
    alike = defaultdict(list)
    for entry in entries:
        on = f", on {text_of(entry.result)}" if len(texts) > 1 and entry.perplexity else ""
        words.append(label(entry) + on)
        alike[words[-1]].append(entry)
    found = []
    for word, entry in zip(words, entries):
        parts = TRAINED_BY if entry.model == "augmented" or entry.trained else ()
        if of_perplexity and entry.perplexity:
            parts += EVALUATED_BY
        found.append(word + _differences(entry.result, [e.result for e in alike[word]], parts))
    return found


def _differences(result: Result, others: Sequence[Result], parts: Sequence[str]) -> str:
    """Names the decoder and the keys of parts of the config in which results differ.

    A key that an older file lacks is no difference.
    """
    found = ""
    if any(other.decoder != result.decoder for other in others):
        found += f", of decoder {result.decoder}"
    keys = ["compute.dtype"]
    for part in parts:
        keys += [f"{part}.{key}" for key in result.data["config"].get(part, {})]
    for key in keys:
        value = result.record[key]
        values = {str(other.record[key]) for other in others if other.record[key] is not None}
        if len(values) > 1 and key not in NOT_NAMED:
            found += f", {key} {value}"
    return found
