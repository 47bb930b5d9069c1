"""Writes text as `files:GLOB` is read, and tasks as the lm-eval harness reads them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SEPARATOR = "\n\f\n"  # between the documents of a file


def write_documents(file: Path, documents: Iterable[str]) -> None:
    """Writes a file of documents; makes its folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(SEPARATOR.join(documents) + "\n", encoding="utf-8")


def write_task(
    folder: Path,
    name: str,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    asked: Mapping[str, Any],
) -> None:
    """Writes NAME.yaml, and NAME.SPLIT.jsonl for each split, which NAME.yaml names by the folder.

    Args:
      folder: an existing folder.
      name: the task's name.
      rows: by split; "train", if it is there, holds worked examples.
      asked: the settings of the harness that say how a row is asked.
    """
    import yaml

    files = {split: f"{name}.{split}.jsonl" for split in rows}
    settings: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
    }
    if "train" in rows:  # the same worked examples for every document: every prompt begins alike
        settings |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    settings |= {**asked, "metadata": {"version": 1.0}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for split, file in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split]]
        (folder / file).write_text("".join(lines), encoding="utf-8")
