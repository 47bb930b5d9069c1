"""Loads tasks of the lm-eval harness: its own, those in local files, and files of questions.

This module is imported only where it is used.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from latent_delib.data import questions
from latent_delib.data.questions import Question
from latent_delib.errors import UserError, reason
from latent_delib.measure.scores import BenchmarkRow

MAX_NEW_TOKENS = 256  # for a task that sets no limit, as in the harness's own models

# The form in which the harness loads tasks: under "tasks" each task by name, and their groups.
Tasks = dict[str, Any]


def load_local_task(task: str, folder: str) -> Tasks:
    """Loads a task that `make_tasks` wrote to a folder, with its data.

    Raises:
      UserError: a file is missing, or not what `make_tasks` writes.
    """
    path = Path(folder) / f"{task}.yaml"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; tools.make_tasks makes the tasks of configs/benchmarks.py, and "
            "tools.make_problems those of configs/problems.py; --tasks names the folder"
        )
    rows = {}
    with _loading(path):
        spec = yaml.safe_load(path.read_text())
        for split, name in spec["dataset_kwargs"]["data_files"].items():
            if Path(name).name != name or not name.startswith(f"{task}."):  # others have no digest
                raise UserError(f"{path}: data file {name!r}: expected {task}.{split}.jsonl")
            rows[split] = _read_json_lines(path.parent / name)
        return _load(spec, rows)


def load_questions(path: str) -> Tasks:
    """Makes a task of a file of questions and answers (see `data.questions`).

    Raises:
      UserError: the file is missing or empty, or a line has another form or text that is not
        Unicode.
    """
    found = _read_lines(path, functools.partial(questions.read, with_steps=False), "questions")
    asked = list(found.values())
    replies = [question.reply(bool(question.steps)) for question in asked]
    with _loading(path):
        rows = [question._asdict() for question in asked]
        return _load(_task_of_questions(path, replies), {"test": rows})


def _load(spec: dict[str, Any], rows: Mapping[str, Sequence[dict[str, Any]]]) -> Tasks:
    """Loads a task of these rows, by split.

    The library `datasets` is not given the file: it would turn a column of dates into other text.
    """
    found = {split: datasets.Dataset.from_list(list(some)) for split, some in rows.items()}
    ours = {"dataset_path": None, "dataset_kwargs": None, "custom_dataset": lambda **_: found}
    logging.disable(logging.WARNING)  # the harness has one for each task with rows of its own
    try:
        return TaskManager(include_defaults=False).load([spec | ours])
    finally:
        logging.disable(logging.NOTSET)


def _task_of_questions(path: str, replies: Sequence[str]) -> dict[str, Any]:
    """Returns a task, as the harness's own yaml files describe one, of a file of questions."""
    return {
        "task": Path(path).stem,
        "test_split": "test",
        "output_type": "generate_until",
        # Functions, not templates: the harness turns a target in brackets into a list.
        "doc_to_text": lambda doc: question_of(doc).prompt(),
        "doc_to_target": lambda doc: question_of(doc).reply(with_steps=False).strip(),
        "target_delimiter": " ",
        "generation_kwargs": {
            "until": [questions.STOP],
            "max_gen_toks": questions.enough_tokens(replies),
        },
        "filter_list": [
            {
                "name": "none",
                "filter": [
                    {"function": "regex", "regex_pattern": questions.ANSWER},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def question_of(doc: dict[str, Any]) -> Question:
    """Returns a document of `load_questions` as a question, without steps."""
    return Question(doc["question"], doc["answer"])


@contextlib.contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """Turns any error of loading a task into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # yaml and datasets raise many kinds
        raise UserError(f"{path}: the task cannot be loaded ({reason(error)})") from None


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines.

    Raises:
      UserError: the file is missing or empty; a line is no JSON object, lacks a field that the
        first one has, or has a `gold` that is no index of its `choices`.
    """
    rows = _read_lines(path, _read_object, "documents")
    first = next(iter(rows.values()))
    for number, row in rows.items():
        missing = first.keys() - row.keys()
        if missing:
            has_no = f"has no {min(missing)!r}, which the first line has"
            raise UserError(f"{path}: line {number}: {has_no}")
    return list(rows.values())


def _read_lines(path: str | Path, read: Callable[[bytes], Any], what: str) -> dict[int, Any]:
    """Reads the lines of a file that are not blank; returns number of the line -> its content.

    Raises:
      UserError: the file is missing or has no such line; `read` raises ValueError for a line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found[number] = read(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number}: {error}") from None
    if not found:
        raise UserError(f"{path}: holds no {what}")
    return found


def _read_object(line: bytes) -> dict[str, Any]:
    """Reads a line; raises ValueError unless it is a JSON object whose `gold` names a choice."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, not {type(row).__name__}")
    if {"choices", "gold"} <= row.keys():
        choices, gold = row["choices"], row["gold"]
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"'choices' is {choices!r}, expected a list of text")
        if gold is None or (isinstance(gold, int) and not 0 <= gold < len(choices)):
            raise ValueError(f"'gold' is {gold!r}, expected a number from 0 to {len(choices) - 1}")
    return row


def load_public_task(task: str) -> Tasks:
    """Loads a task or group of tasks of the harness, with its data from the network or its cache.

    Raises:
      UserError: there is no task of that name, or its data cannot be fetched.
    """
    if task not in _public_tasks().all_tasks:
        raise UserError(f"task {task}: lm-eval has none of that name")
    try:
        return _public_tasks().load([task])
    except Exception as error:  # datasets raises many kinds
        remedy = "go online once; without a network, HF_HUB_OFFLINE=1 uses data fetched before"
        raise UserError(
            f"task {task}: its data cannot be loaded ({reason(error)}); {remedy}"
        ) from None


@functools.cache
def _public_tasks() -> TaskManager:
    """Returns the harness's own tasks, which take seconds to list."""
    return TaskManager()


def kinds(loaded: Tasks) -> set[str]:
    """Returns the kinds of questions, as the harness names them.

    They are generate_until, multiple_choice, loglikelihood and loglikelihood_rolling.
    """
    return {task.OUTPUT_TYPE for task in loaded["tasks"].values()}


def longest_answer(loaded: Tasks) -> int:
    """Returns the most tokens of an answer that a benchmark generates; 0: it generates none."""
    longest = 0
    for task in loaded["tasks"].values():
        if task.OUTPUT_TYPE == "generate_until":
            kwargs = normalize_gen_kwargs(dict(task.config.generation_kwargs), MAX_NEW_TOKENS)
            longest = max(longest, kwargs["max_gen_toks"])
    return longest


def check_row(loaded: Tasks, row: BenchmarkRow, where: str) -> None:
    """Checks what a table says of a benchmark against its tasks.

    Args:
      row: the row of the table.
      where: the table's file, for the message.

    Raises:
      UserError: a task lacks the metric, the filter, or documents for the worked examples.
    """
    for name, task in loaded["tasks"].items():
        filters = [each["name"] for each in task.config.filter_list or ({"name": "none"},)]
        for key, there in (("metric", list(task.aggregation())), ("filter", filters)):
            asked = row.get(key, "none")
            if asked not in there:
                raise UserError(f"{where}: {name}: {key}={asked!r}, the task has {there}")
        if not row["shots"]:
            continue
        exclude_asked_document(task)
        most = len(task.fewshot_docs())
        if task.fewshot_cfg.split == task.config.test_split:
            most -= 1  # the asked one
        if row["shots"] > most:
            raise UserError(f"{where}: {name}: shots={row['shots']}, the task has {most} to show")


def exclude_asked_document(task: Any) -> None:
    """Makes the harness (0.4.13) leave the asked document out of its worked examples.

    The harness does so only where the split of the examples is named. Here that is the split that
    is asked.
    """
    shown = task.fewshot_cfg
    has_others = task.has_training_docs() or task.has_validation_docs() or shown.samples
    if shown.split is None and not has_others:
        shown.split = task.config.test_split
