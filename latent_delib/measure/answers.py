"""Asks a model the questions of `data.validation` while it is trained."""

from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from latent_delib.data import batches, questions, sources
from latent_delib.delib.augment import assemble
from latent_delib.delib.methods import METHODS
from latent_delib.job.experiment import Experiment
from latent_delib.lm.load import Coprocessor, Decoder, assistant_of
from latent_delib.lm.model import AugmentedLM
from latent_delib.measure import scores, views
from latent_delib.nn.transformer import Params

QUESTIONS = 100  # of each source, the first ones


class Asked(NamedTuple):
    """Holds a question.

    prompt: tokens, BOS first. reply: the tokens that are right, with steps where they are learned.
    answer: the text of it that counts.
    """

    prompt: list[int]
    reply: list[int]
    answer: str


class Answers:
    """Counts the questions that a model answers right, and scores the right replies.

    They are the first QUESTIONS of each source of questions in `data.validation`. A reply is
    generated greedily, and right where `benchmark --benchmarks=qa:FILE` says so. Where the method
    writes latents for a frozen decoder, that decoder is asked once.

    Args:
      exp: the job's.
      frozen: the frozen parameters, on the mesh.

    Raises:
      UserError: a source of questions is missing or empty.
    """

    def __init__(self, exp: Experiment, frozen: Params):
        self.exp = exp
        self.frozen = frozen
        self.asked, self.room = _read(exp)
        self.decoder: dict[str, float] = {}
        trains_decoder = METHODS[exp.aug.method].trains_decoder
        if self.asked and exp.aug.has_latents and not trains_decoder:
            found = self._figures(frozen, has_latents=False)
            self.decoder = {f"{name}_decoder": value for name, value in found.items()}

    def __call__(self, trainable: Params) -> dict[str, float]:
        """Returns the figures of a row of metrics; none where there are no questions.

        These are validation_solved, in percent, and validation_answer, the mean log p of a right
        reply, in nats. Of each there are the ends of its 95 % interval, with _low and _high behind.
        Those of the frozen decoder have _decoder behind.
        """
        if not self.asked:
            return {}
        trained = jax.tree.map(lambda x: x.astype(self.exp.dtype), trainable)
        params = assemble(self.frozen, trained)
        return self._figures(params, self.exp.aug.has_latents) | self.decoder

    def _figures(self, params: Params, has_latents: bool) -> dict[str, float]:
        lm = _model(self.exp, params, has_latents)
        prompts = [asked.prompt for asked in self.asked]
        replies = [asked.reply for asked in self.asked]
        batch_size = self.exp.config.evaluate.batch_size
        texts = lm.generate(
            prompts, self.room, stop=questions.STOP, temperature=0.0, batch_size=batch_size
        )
        found = [questions.answer_in(text) for text in texts]
        right = [answer == asked.answer for answer, asked in zip(found, self.asked)]
        logp, _ = lm.logprobs(prompts, replies, batch_size=batch_size)
        solved = scores.percent(np.array(right, np.float64))
        scored = scores.mean(logp.astype(np.float64))
        return _named("validation_solved", solved) | _named("validation_answer", scored)


def _named(name: str, figure: scores.Figure) -> dict[str, float]:
    """Returns a figure and the ends of its interval, where it has one."""
    value, _, low, high = figure
    if low is None or high is None:
        return {name: value}
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _model(exp: Experiment, params: Params, has_latents: bool) -> AugmentedLM:
    """Returns the model in use that parameters make, on the mesh of the job."""
    aug = exp.aug
    fingerprint = exp.record.fingerprint
    decoder = Decoder(aug.transformer.config, params["decoder"], exp.tokenizer, fingerprint)
    coprocessor = None
    if has_latents:
        coprocessor = Coprocessor(
            params["coprocessor"],
            aug.method,
            aug.num_latents,
            aug.placement,
            fingerprint,
            architecture=None if aug.coprocessor is None else aug.coprocessor.config,
            every=aug.every,
            assistant=assistant_of(exp.record),
        )
    attention = exp.config.compute.attention
    return AugmentedLM(decoder, coprocessor, mesh=exp.mesh, attention=attention)


def _read(exp: Experiment) -> tuple[list[Asked], int]:
    """Returns the questions, and the tokens that a reply has room for."""
    data = exp.config.data
    named = [source for source in data.validation if sources.has_questions(source)]
    if named and jax.process_count() > 1:
        if jax.process_index() == 0:
            print(f"{', '.join(named)}: not asked, one process alone generates answers", flush=True)
        named = []
    asked: list[Asked] = []
    replies: list[str] = []
    for source in named:
        one = ConfigDict({**data, "validation": (source,)})
        documents = batches.validation_documents(one, tokenizer_path=str(exp.tokenizer.path))
        for number, document in enumerate(documents):
            tokens = document.tokens
            if exp.steps_end and sources.has_steps(source):  # latents stand for them
                at = views.prompt_ends(tokens, exp.prompt_end)
                tokens, _ = views.without_steps(tokens, at, exp.steps_end)
            prompt, reply = questions.parted(tokens.tolist(), exp.tokenizer)
            text = exp.tokenizer.decode(reply)
            replies.append(text)
            if number < QUESTIONS:
                answer = questions.answer_in(text)
                asked.append(Asked([exp.tokenizer.bos_id, *prompt], reply, answer))
    return asked, questions.room_for(replies)
