"""The lm-eval harness over our models: its tasks loaded, and one adapter. Imported only where it is used.

Token for token it asks what the harness's own `hf` model asks with add_bos_token=True. It differs where that model has
no right answer: BOS stays when a prompt is cut, and each piece of a long text begins with it.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine.progress import Progress

SAMPLING = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k"}
MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness's own models
SHOTS_SEED = 1234  # the harness's own


class Adapter(TemplateLM):
    """An AugmentedLM as the harness wants it. A prompt has BOS at its start, once, whether or not its text spells it.

    Args:
      augment: with latents. every, delay: as in AugmentedLM.continuations; `every` also where a text is read.
      cot: put where a generated answer would begin.
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
        self.lm, self.augment, self.every, self.delay, self.cot = lm, augment, every, delay, cot
        self.rows, self.bos = batch_size, _spelled_bos(lm.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.lm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.lm.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, BOS first unless add_special_tokens is False."""
        ids = self.lm.tokenizer.encode(string.removeprefix(self.bos))
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # we have a progress line of our own

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether greedy decoding says the same. Equal prompts are read once."""
        prompts = [self._cut(context, len(continuation)) for _, context, continuation in requests]
        tails = [continuation for _, _, continuation in requests]
        progress = Progress("scored", len(tails), "answers")
        sums, greedy = self.lm.logprobs(prompts, tails, self.augment, self.rows, progress)
        return list(zip(sums.tolist(), greedy.tolist()))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        pieces = sum(-(-len(text) // (self.lm.max_length - 1)) for text in texts)
        progress = Progress("read", pieces, "pieces of text")
        return self.lm.rolling_logprobs(texts, self.augment, self.every, self.rows, progress).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        found: dict[int, str] = {}
        for options, some in groups.items():
            kwargs = normalize_gen_kwargs(json.loads(options), MAX_NEW_TOKENS)
            if unknown := kwargs.keys() - SAMPLING:
                raise UserError(f"{requests[some[0]].task_name}: generation_kwargs {sorted(unknown)} are not supported")
            new, drawn = kwargs["max_gen_toks"], kwargs["do_sample"]
            prompts = [self._cut(self.tok_encode(self._asked(requests[i].args[0])), new) for i in some]
            texts = self.lm.generate(
                prompts,
                new,
                temperature=kwargs.get("temperature", 1.0 if drawn else 0.0),
                top_k=kwargs.get("top_k", 0),
                top_p=kwargs.get("top_p", 1.0),
                stop=tuple(filter(None, kwargs["until"])),
                seed=some,
                augment=self.augment,
                every=self.every,
                delay=self.delay,
                batch_size=self.rows,
                progress=Progress("decoded", new * len(some), "tokens"),
            )
            found.update(zip(some, texts))
        return [found[i] for i in range(len(requests))]

    def _asked(self, context: str) -> str:
        return context + (self.cot and f"{'' if context[-1:].isspace() else ' '}{self.cot}")

    def _cut(self, context: list[int], new: int) -> list[int]:
        """A prompt that leaves room for `new` tokens: cut on the left, behind its first token."""
        too_many = len(context) + new - self.lm.max_length
        return context if too_many <= 0 else [*context[:1], *context[1 + too_many :]]


def load(task: str, folder: str, manager: TaskManager | None = None) -> dict[str, Any]:
    """A task or group of tasks with its data, as `run` takes it.

    Args:
      folder: where make_tasks wrote the task. manager: knows the harness's own tasks, if it is one of those.

    Raises:
      UserError: a bad row in a file of `folder`; nothing by that name.
    """
    spec: Any = task
    if manager is None:
        manager, path = TaskManager(include_defaults=False), Path(folder) / f"{task}.yaml"
        if not path.is_file():
            raise UserError(f"{path}: no such file; `python -m tools.make_tasks --out={folder}` makes it")
        spec = yaml.safe_load(path.read_text())
        files = spec["dataset_kwargs"]["data_files"]
        for split, name in files.items():
            check_rows(path.parent / name, spec["output_type"])
            files[split] = str((path.parent / name).resolve())
    elif task not in manager.all_tasks:
        raise UserError(f"task {task}: lm-eval has none of that name")
    return manager.load([spec])


def kinds(loaded: dict[str, Any]) -> set[str]:
    """What a benchmark asks of a model: generate_until, multiple_choice, loglikelihood, loglikelihood_rolling."""
    return {task.OUTPUT_TYPE for task in loaded["tasks"].values()}


def longest_answer(loaded: dict[str, Any]) -> int:
    """Tokens of the longest answer that a benchmark generates; 0 for one that generates none."""
    asked = [t.config.generation_kwargs for t in loaded["tasks"].values() if t.OUTPUT_TYPE == "generate_until"]
    return max((normalize_gen_kwargs(dict(kwargs), MAX_NEW_TOKENS)["max_gen_toks"] for kwargs in asked), default=0)


def run(
    adapter: Adapter, loaded: dict[str, Any], shots: int, limit: int | None = None, unsafe_code: bool = False
) -> list[dict[str, Any]]:
    """The harness's result for each document and each filter it goes through; the first `limit` documents of a task."""
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(SHOTS_SEED)
        if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_target:  # AGIEval; a worked example shows the first
            task.fewshot_cfg.doc_to_target = functools.partial(_first_right, task)
    results = evaluator.evaluate(
        adapter, loaded, limit=limit, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=unsafe_code
    )
    return [{"task": task, **sample} for task, samples in results["samples"].items() for sample in samples]


def _first_right(task: Any, doc: dict[str, Any]) -> str:
    """The text of the first right choice, where a document has several: the harness (0.4.13) cannot show their list."""
    return task.doc_to_choice(doc)[task.doc_to_target(doc)[0]]


def _spelled_bos(tokenizer: Tokenizer) -> str:
    if tokenizer.path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(tokenizer.path)).id_to_token(tokenizer.bos_id)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    return model.id_to_piece(tokenizer.bos_id)


def check_rows(path: Path, output_type: str) -> None:
    """Reads a task's rows, one JSON object a line.

    generate_until: question, answer; multiple_choice: question, choices, gold (index of the right one);
    loglikelihood_rolling: text.

    Raises:
      UserError: no such file, no rows, or a bad one, which it names as FILE:LINE.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    strings = {"generate_until": ("question", "answer"), "multiple_choice": ("question",)}.get(output_type, ("text",))
    lines = path.read_bytes().splitlines()
    if not lines:
        raise UserError(f"{path}: empty, expected a JSON object a line")
    for i, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{i}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{i}: holds {type(row).__name__}, expected an object")
        for key in strings:
            if not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"{path}:{i}: {key}={row.get(key)!r}, expected text")
        if output_type != "multiple_choice":
            continue
        choices, gold = row.get("choices"), row.get("gold")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise UserError(f"{path}:{i}: choices={choices!r}, expected two texts or more")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise UserError(f"{path}:{i}: gold={gold!r}, expected 0 to {len(choices) - 1}")
