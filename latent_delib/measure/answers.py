"""Asks a model the questions of `data.validation` while it is trained."""

import itertools
from typing import NamedTuple

import jax
import numpy as np

from latent_delib.data import batches, questions, sources
from latent_delib.delib.augment import assemble
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job.experiment import Experiment
from latent_delib.lm.load import Coprocessor, Decoder
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine import arguments
from latent_delib.measure import scores, views
from latent_delib.nn.transformer import Params

NUM_QUESTIONS = 100  # asked of each source: its first ones


class Asked(NamedTuple):
    """Holds a question.

    prompt: tokens, BOS first.
    reply: the tokens of the right reply, with its steps if these are trained on.
    answer: the part of the reply's text that counts.
    room: a number of tokens that is enough for the reply with all steps in the text. A decoder may
      write the steps even if they are not trained on.
    """

    prompt: list[int]
    reply: list[int]
    answer: str
    room: int


class Answers:
    """Counts the questions that a model answers right, and scores the right replies.

    The questions are the first NUM_QUESTIONS of each source of questions in `data.validation`.
    Replies are decoded greedily, and judged as `benchmark --benchmarks=qa:FILE` judges them. A
    frozen decoder is asked once, at the start.

    Args:
      exp: the job's experiment.
      asked: the questions, from `read_questions`.
      frozen: the frozen parameters, on the mesh.
    """

    def __init__(self, exp: Experiment, asked: list[Asked], frozen: Params):
        self.exp = exp
        self.asked = asked
        self.frozen = frozen
        self.decoder_figures: dict[str, float] = {}
        trains_decoder = METHODS[exp.aug.method].trains_decoder
        if self.asked and exp.aug.writes_latents and not trains_decoder:
            found = self._figures(frozen, has_latents=False)
            for name, value in found.items():
                self.decoder_figures[f"{name}_decoder"] = value

    def __call__(self, trainable: Params) -> dict[str, float]:
        """Returns figures for a row of metrics; none where there are no questions.

        validation_solved: questions answered right, percent.
        validation_answer: the mean log p of a right reply, nats.
        NAME_low, NAME_high: the ends of a figure's 95 % interval.
        NAME_decoder: the frozen decoder's figure.
        """
        if not self.asked:
            return {}
        trained = jax.tree.map(lambda x: x.astype(self.exp.dtype), trainable)
        params = assemble(self.frozen, trained)
        figures = self._figures(params, self.exp.aug.writes_latents)
        return figures | self.decoder_figures

    def _figures(self, params: Params, has_latents: bool) -> dict[str, float]:
        lm = _model(self.exp, params, has_latents)
        prompts = [asked.prompt for asked in self.asked]
        replies = [asked.reply for asked in self.asked]
        batch_size = self.exp.config.evaluate.batch_size
        room = max(asked.room for asked in self.asked)
        texts = lm.generate(
            prompts, room, stop=questions.STOP, temperature=0.0, batch_size=batch_size
        )
        found = [questions.answer_in(text) for text in texts]
        right = [answer == asked.answer for answer, asked in zip(found, self.asked)]
        logp, _ = lm.logprobs(prompts, replies, batch_size=batch_size)
        solved = scores.percent(np.array(right, np.float64))
        scored = scores.mean(logp.astype(np.float64))
        return scores.named("validation_solved", solved) | scores.named("validation_answer", scored)


def _check_lengths(asked: list[Asked], positions: int) -> None:
    """Raises UserError where the longest question leaves no room for the longest reply."""
    prompt = max((len(each.prompt) for each in asked), default=0)
    reply = max((max(each.room, len(each.reply)) for each in asked), default=0)
    if prompt + reply > positions:
        raise UserError(
            f"config.data.validation: a question has {prompt} tokens, and a reply up to {reply}; "
            f"expected {positions} together at most, the decoder's learned positions"
        )


def _model(exp: Experiment, params: Params, has_latents: bool) -> AugmentedLM:
    """Returns the AugmentedLM of these parameters, on the mesh of the job."""
    aug = exp.aug
    fingerprint = exp.record.fingerprint
    decoder = Decoder(aug.decoder.config, params["decoder"], exp.tokenizer, fingerprint)
    coprocessor = None
    if has_latents:
        coprocessor = Coprocessor(
            params["coprocessor"], exp.record, fingerprint, params.get("assistant")
        )
    attention = exp.config.compute.attention
    return AugmentedLM(
        decoder, coprocessor, mesh=exp.mesh, max_length=arguments.INT32, attention=attention
    )


def read_questions(exp: Experiment) -> list[Asked]:
    """Returns the first NUM_QUESTIONS questions of each source; none to several processes.

    Raises:
      UserError: a source of questions is missing or empty; a question and its reply are longer than
        a table of learned positions.
    """
    data = exp.config.data
    named = [source for source in data.validation if sources.has_questions(source)]
    if named and jax.process_count() > 1:
        if jax.process_index() == 0:
            print(
                f"{', '.join(named)}: not asked; only jobs of one process ask questions", flush=True
            )
        named = []
    asked: list[Asked] = []
    for source in named:
        documents = batches.validation_documents(data, tokenizer=exp.tokenizer, sources=[source])
        for document in itertools.islice(documents, NUM_QUESTIONS):
            tokens = document.tokens
            _, written = questions.parted(tokens.tolist(), exp.tokenizer)
            room = questions.enough_tokens([exp.tokenizer.decode(written)])
            if exp.steps_end and sources.has_steps(source):  # latents replace the steps
                at = views.prompt_ends(tokens, exp.prompt_end)
                tokens, _ = views.without_steps(tokens, at, exp.steps_end)
            prompt, reply = questions.parted(tokens.tolist(), exp.tokenizer)
            answer = questions.answer_in(exp.tokenizer.decode(reply))
            asked.append(Asked([exp.tokenizer.bos_id, *prompt], reply, answer, room))
    _check_lengths(asked, exp.aug.longest_text)
    return asked
