"""The documents of a benchmark that needs no network. `make_tasks` writes them, `benchmark` reads them.

generate_until: question, answer. multiple_choice: question, choices, gold (index of the right one). Any other kind of
question: text.
"""

import json
from pathlib import Path
from typing import Any

from latent_delib.errors import UserError

# Kind of question -> the fields of a document that are text; for any other kind, "text".
STRINGS = {"generate_until": ("question", "answer"), "multiple_choice": ("question",)}


def check_documents(path: Path, output_type: str) -> None:
    """Checks the documents of a task, one JSON object per line; `output_type` is its kind of question.

    Raises:
      UserError: no such file, no document, or a bad one, which it names as FILE:LINE.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = path.read_bytes().splitlines()
    if not lines:
        raise UserError(f"{path}: empty, expected a JSON object on each line")
    for number, line in enumerate(lines, start=1):
        try:
            fault = _fault(json.loads(line), output_type)
        except (ValueError, RecursionError) as error:
            fault = f"not JSON ({error})"
        if fault:
            raise UserError(f"{path}:{number}: {fault}")


def _fault(row: Any, output_type: str) -> str:
    """Returns the fault of a document; "" where it is right."""
    if not isinstance(row, dict):
        return f"holds {type(row).__name__}, expected an object"
    for key in STRINGS.get(output_type, ("text",)):
        if not _is_text(row.get(key)):
            return f"{key}={row.get(key)!r}, expected text"
    if output_type != "multiple_choice":
        return ""
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        return f"choices={choices!r}, expected two texts or more"
    gold = row.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"gold={gold!r}, expected 0 to {len(choices) - 1}"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
