"""The model card of an exported coprocessor, Markdown as the Hugging Face Hub shows it."""

from typing import Any

from latent_delib.job.record import Record
from latent_delib.job.words import settings_in_words
from latent_delib.results.evaluation import as_text

TRAINING = (  # keys of the config that the card lists
    "data.sources",
    "data.seq_len",
    "method.num_traces",
    "method.num_ahead",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.soft_token_learning_rate",
    "train.steps",
    "train.batch_size",
    "seed",
)


def card(
    record: Record,
    decoder: str,
    fingerprint: str,
    origin: dict[str, str],
    evaluation: dict[str, Any] | None,
) -> str:
    """Returns a coprocessor's model card.

    Args:
      record: the record of its checkpoint.
      decoder, fingerprint: the path and the SHA-256 of the decoder that it belongs to.
      origin: the model on the Hub that this decoder is or was converted from
        (`weights.folder.origin`), or {}.
      evaluation: the content of perplexity.json for that checkpoint, or None.
    """
    method = record.config["method"]
    latents = f"{method['num_latents']} latents"
    path = decoder if decoder == origin.get("source") else "DECODER"
    settings = ", ".join([latents, *settings_in_words(method), f"step {record.step:,}"])
    lines = [
        "---",
        "library_name: latent_delib",
        "tags: [latent-reasoning, cache-augmentation]",
        *_base_model(origin),
        "---",
        "",
        "# A coprocessor for one decoder",
        "",
        f"Method `{method['name']}`, {settings}. It belongs to this decoder alone:",
        f"fingerprint `{fingerprint}`, `{decoder}` where it was trained.",
        *_conversion(origin, decoder),
        *_assistant(record),
        "",
        "```python",
        "import latent_delib as ld",
        "",
        f'decoder = ld.load_decoder("{path}")',
        'coprocessor = ld.load_coprocessor("hf:OWNER/NAME")',
        "lm = ld.AugmentedLM(decoder, coprocessor)",
        "```",
        "",
        "## Training",
        "",
        "| key | value |",
        "|---|---|",
    ]
    for key in TRAINING:
        value = record[key]
        if value not in (None, ""):
            lines.append(f"| `{key}` | {value} |")
    if evaluation is not None:
        lines += ["", "## Perplexity, with latents and without", "", "```"]
        lines += [as_text(evaluation), "```"]
    return "\n".join(lines) + "\n"


def _base_model(origin: dict[str, str]) -> list[str]:
    """Returns the line by which the Hub shows the model that a coprocessor is for."""
    if not origin:
        return []
    model, _, _ = origin["source"].partition("@")
    return [f"base_model: {model.removeprefix('hf:')}"]


def _conversion(origin: dict[str, str], decoder: str) -> list[str]:
    """Returns the lines on how to make the decoder, if it was converted from a model on the Hub."""
    if not origin or origin["source"] == decoder:
        return []
    command = f"python -m latent_delib.convert --source={origin['source']} --out=DECODER"
    if origin["dtype"]:
        command += f" --dtype={origin['dtype']}"
    return ["This makes it:", "", "```sh", command, "```"]


def _assistant(record: Record) -> list[str]:
    """Returns the lines about the assistant, if there is one."""
    if not record.assistant:
        return []
    path = record.config["method"]["assistant"]
    return [
        "It reads the cache of an assistant, `PATH` in `ld.load_coprocessor(..., assistant=PATH)`:",
        f"fingerprint `{record['method.assistant']}`, `{path}` where it was trained.",
    ]
