"""Runs the lm-eval harness over our models.

This module is imported only where it is used. Its prompts are, token for token, the prompts of the
harness's `hf` model with add_bos_token=True, with three exceptions: BOS stays when a prompt is cut;
each piece of a long text begins with BOS, which is not scored; and Qwen's <|endoftext|> counts as
BOS.
"""

import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from latent_delib.errors import UserError
from latent_delib.lm import sampling
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine.progress import Progress
from latent_delib.measure.harness_tasks import (
    MAX_NEW_TOKENS,
    Tasks,
    exclude_asked_document,
    longest_answer,
    question_of,
)

SHOTS_SEED = 1234  # the harness's own


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
        pieces = sum(math.ceil(len(text) / (self.lm.max_length - 1)) for text in texts)
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
          loaded: from `harness_tasks.load_questions`.
          limit: as for `run_tasks`.

        Raises:
          UserError: a reply leaves no room for its prompt.
        """
        ((name, task),) = loaded["tasks"].items()
        room = longest_answer(loaded)
        requests = []
        for number, doc in enumerate(itertools.islice(task.eval_docs, limit)):
            question = question_of(doc)
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


def run_tasks(
    adapter: Adapter, loaded: Tasks, shots: int, limit: int | None = None, unsafe_code: bool = False
) -> list[dict[str, Any]]:
    """Returns the harness's result for each document and each filter it goes through.

    Args:
      loaded: from a function of `harness_tasks`.
      shots: worked examples in each prompt.
      limit: number of documents of each task, from the first on; None: all.
      unsafe_code: whether code that the model writes may run.
    """
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(SHOTS_SEED)
        exclude_asked_document(task)
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


def _first_right(task: Any, doc: dict[str, Any]) -> str:
    """Returns the first of several right choices; the harness (0.4.13) cannot show their list."""
    return task.doc_to_choice(doc)[task.doc_to_target(doc)[0]]
