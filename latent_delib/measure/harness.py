"""Runs the lm-eval harness over our models: loads its tasks, and adapts a model to it.

This module is imported only where it is used. Its prompts are, token for token, the prompts of the
harness's `hf` model with add_bos_token=True, with two exceptions: BOS stays when a prompt is cut,
and each piece of a long text begins with BOS.
"""

import contextlib
import functools
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from latent_delib.data import questions
from latent_delib.data.questions import Question
from latent_delib.errors import UserError, reason
from latent_delib.lm import sampling
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine.progress import Progress

MAX_NEW_TOKENS = 256  # for a task that sets no limit, as in the harness's own models
SHOTS_SEED = 1234  # the harness's own

# The form in which the harness loads tasks: under "tasks" each task by name, and their groups.
Tasks = dict[str, Any]


class Adapter(TemplateLM):
    """Adapts an AugmentedLM to the harness.

    A prompt begins with exactly one BOS, whether or not its text spells BOS.

    Args:
      augment: whether to use latents.
      every, delay: as in `AugmentedLM.continuations`; `every` also applies where a text is scored.
      batch_size: prompts at once.
      cot: words of zero-shot CoT, put where a generated answer begins.
    """

    def __init__(
        self,
        lm: AugmentedLM,
        augment: bool = True,
        every: int = 0,
        delay: int = 0,
        batch_size: int = 16,
        cot: str = "",
    ):
        super().__init__()
        self.lm = lm
        self.augment = augment
        self.every = every
        self.delay = delay
        self.cot = cot
        self.rows = batch_size  # the harness has a batch_size of its own
        self.bos = lm.tokenizer.spell(lm.tokenizer.bos_id)

    @property
    def eot_token_id(self) -> int:
        return self.lm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.lm.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns token ids, BOS first unless add_special_tokens is False."""
        ids = self.lm.tokenizer.encode(string.removeprefix(self.bos))
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the progress line is ours

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns log p of each continuation, and whether greedy decoding gives it."""
        prompts = []
        tails = []
        for _, context, continuation in requests:
            prompts.append(self._cut(context, len(continuation)))
            tails.append(continuation)
        progress = Progress("scored", len(tails), "answers")
        sums, greedy = self.lm.logprobs(prompts, tails, self.augment, self.rows, progress)
        return list(zip(sums.tolist(), greedy.tolist()))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        pieces = sum(-(-len(text) // (self.lm.max_length - 1)) for text in texts)
        progress = Progress("read", pieces, "pieces of text")
        sums = self.lm.rolling_logprobs(texts, self.augment, self.every, self.rows, progress)
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        found: dict[int, str] = {}
        for options, some in groups.items():
            kwargs = normalize_gen_kwargs(json.loads(options), MAX_NEW_TOKENS)
            new = kwargs.pop("max_gen_toks")
            stop = kwargs.pop("until")
            drawn = kwargs.pop("do_sample")
            unknown = kwargs.keys() - sampling.options().keys()
            if unknown:
                task = requests[some[0]].task_name
                raise UserError(f"{task}: generation_kwargs {sorted(unknown)} are not supported")
            sampler = {"temperature": 1.0 if drawn else 0.0} | kwargs
            if not sampler["temperature"]:
                sampler = {}  # nothing is drawn, so no setting of the task counts
            prompts = []
            for i in some:
                prompt = self.tok_encode(self._with_cot(requests[i].args[0]))
                prompts.append(self._cut(prompt, new))
            texts = self.lm.generate(
                prompts,
                new,
                stop=[text for text in stop if text],
                seed=some,
                augment=self.augment,
                every=self.every,
                delay=self.delay,
                batch_size=self.rows,
                progress=Progress("decoded", new * len(some), "tokens"),
                **sampler,
            )
            found.update(zip(some, texts))
        return [found[i] for i in range(len(requests))]

    def answer_logprobs(self, loaded: Tasks, limit: int | None = None) -> list[float]:
        """Returns log p of the right reply to each question, without steps, in nats.

        Prompt and reply have the tokens of `data.questions.encode`. A prompt is cut as it is where
        the reply is generated. Latents join at its end, and `every` and `delay` do not count.

        Args:
          loaded: from `load_questions`.
          limit: as for `run_tasks`.

        Raises:
          UserError: a reply leaves no room for its prompt.
        """
        ((name, task),) = loaded["tasks"].items()
        room = longest_answer(loaded)
        requests = []
        for number, doc in enumerate(itertools.islice(task.eval_docs, limit)):
            question = _question(doc)
            reply = self.lm.tokenizer.encode_in_text(question.reply(with_steps=False))
            prompt = self._cut(self.tok_encode(question.prompt()), max(room, len(reply)))
            if len(reply) + 2 > self.lm.max_length:  # BOS, and one token that asks
                raise UserError(
                    f"--max_length={self.lm.max_length}: document {number} of {name} has an "
                    f"answer of {len(reply)} tokens; raise --max_length"
                )
            requests.append((("", ""), prompt, reply))
        return [logp for logp, _ in self._loglikelihood_tokens(requests)]

    def _with_cot(self, context: str) -> str:
        """Returns a prompt, with the words of zero-shot CoT where the answer begins."""
        if not self.cot:
            return context
        space = "" if context[-1:].isspace() else " "
        return context + space + self.cot

    def _cut(self, context: list[int], new: int) -> list[int]:
        """Cuts tokens after the first one of a prompt, so that `new` tokens fit after it."""
        too_many = max(0, len(context) + new - self.lm.max_length)
        return [*context[:1], *context[1 + too_many :]]


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
    asked = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--benchmarks=qa:{path}: {reason(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = questions.read(line, with_steps=False)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}") from None
        asked.append(question)
    if not asked:
        raise UserError(f"{path}: holds no questions")
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
        "doc_to_text": lambda doc: _question(doc).prompt(),
        "doc_to_target": lambda doc: _question(doc).reply(with_steps=False).strip(),
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


def _question(doc: dict[str, Any]) -> Question:
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
      UserError: the file is missing or damaged, or a line lacks a field that the first one has.
    """
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {reason(error)}") from None
    for number, row in enumerate(rows, 1):
        missing = rows[0].keys() - row.keys()
        if missing:
            raise UserError(f"{path}: line {number} has no {min(missing)!r}, which line 1 has")
    return rows


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


def run_tasks(
    adapter: Adapter, loaded: Tasks, shots: int, limit: int | None = None, unsafe_code: bool = False
) -> list[dict[str, Any]]:
    """Returns the harness's result for each document and each filter it goes through.

    Args:
      loaded: from `load_local_task`, `load_questions` or `load_public_task`.
      shots: worked examples in each prompt.
      limit: number of documents of each task, from the first on; None: all.
      unsafe_code: whether code that the model writes may run.
    """
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(SHOTS_SEED)
        _exclude_asked_document(task)
        if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_target:  # AGIEval
            task.fewshot_cfg.doc_to_target = functools.partial(_first_right, task)
    results = evaluator.evaluate(
        adapter,
        loaded,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=unsafe_code,
    )
    found = []
    for task, samples in results["samples"].items():
        found += [{"task": task, **sample} for sample in samples]
    return found


def _exclude_asked_document(task: Any) -> None:
    """Makes the harness (0.4.13) leave the asked document out of its worked examples.

    The harness does so only where the split of the examples is named. Here that is the split that
    is asked.
    """
    shown = task.fewshot_cfg
    has_others = task.has_training_docs() or task.has_validation_docs() or shown.samples
    if shown.split is None and not has_others:
        shown.split = task.config.test_split


def _first_right(task: Any, doc: dict[str, Any]) -> str:
    """Returns the first of several right choices; the harness (0.4.13) cannot show their list."""
    return task.doc_to_choice(doc)[task.doc_to_target(doc)[0]]
