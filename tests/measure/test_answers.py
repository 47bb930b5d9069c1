"""Answers during training: what is asked, what counts, and that `benchmark` says the same."""

import json
from functools import partial

import jax
import numpy as np
import pytest
import workdirs

import latent_delib as ld
from latent_delib import prepare, train
from latent_delib.data import questions
from latent_delib.errors import UserError
from latent_delib.job import experiment, parameters
from latent_delib.lm.model import AugmentedLM
from latent_delib.measure import answers
from latent_delib.measure.answers import Answers, read_questions
from tests.run_command import run_command

pytestmark = pytest.mark.usefixtures("shared_steps")
ROWS = (
    {"question": "the cat sat", "answer": "on  a mat", "steps": "it ran"},
    {"question": "Answer: a dog\nAnswer: ran", "answer": "7", "steps": "Answer: to the\ndoor"},
    {"question": "rain fell", "answer": "#7", "steps": "over hills"},
    {"question": "night", "answer": "8", "steps": "fell"},
)


@pytest.fixture
def one_device(monkeypatch):
    """A job and `benchmark` then share their programs."""
    read = partial(experiment.read, devices=jax.devices()[:1])
    monkeypatch.setattr(experiment, "read", read)


@pytest.fixture
def write(tmp_path):
    def to_file(rows, kind="qa"):
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{kind}:{file}"

    return to_file


@pytest.fixture
def config_of(make_config):
    """The tiny config with the packaged decoder, whose tokenizer parts questions and answers."""

    def config(*validation, **more):
        changes = {
            "decoder.path": "packaged",
            "method.placement": "overlay",
            "data.sources": validation[-1:],
            "data.validation": validation,
            "data.token_files": "",
            "evaluate.batch_size": 16,
        }
        return make_config(changes | more)

    return config


@pytest.mark.parametrize("kind", ["qa", "qa_steps"])
def test_what_is_asked(config_of, write, sources, monkeypatch, kind):
    """As `benchmark` asks it, from the tokens alone; the first ones, of sources of questions."""
    monkeypatch.setattr(answers, "NUM_QUESTIONS", 3)
    exp = experiment.read(config_of(sources["validation"], write(ROWS, kind)))
    asked = read_questions(exp)
    encode = exp.tokenizer.encode
    for row, found in zip(ROWS[:3], asked, strict=True):
        question = questions.Question(**row)
        assert found.prompt == [exp.tokenizer.bos_id, *encode(question.prompt())]
        assert found.reply == encode(question.reply(kind == "qa_steps"))
        assert found.answer == " ".join(question.answer.split())
        assert found.room == len(question.reply(kind == "qa_steps"))


def test_a_question_has_room_among_learned_positions():
    """The longest one, with the longest reply: they are asked in batches."""
    asked = [answers.Asked([2] * 5, [3], "", 1), answers.Asked([2], [3] * 4, "", 2)]
    answers._check_lengths(asked, 9)
    with pytest.raises(UserError, match="has 5 tokens, and a reply up to 4; expected 8 together"):
        answers._check_lengths(asked, 8)


def test_what_counts(config_of, write, monkeypatch):
    """Log p is that of the model in use; a reply is right with its steps or without."""
    said = {True: [" on a mat", " x #### 7", "#7", "9 "], False: ["", " 7", " no", "on a mat"]}
    asked = []

    def generate(self, prompts, new, stop, **options):
        asked.append((new, stop, options["temperature"]))
        return said[self.coprocessor is not None]

    monkeypatch.setattr(AugmentedLM, "generate", generate)
    coprocessor = ld.load_coprocessor("packaged")
    config = config_of(write(ROWS), **{"method.num_latents": coprocessor.num_latents})
    exp = experiment.read(config, jax.devices()[:1])
    measure = Answers(exp, read_questions(exp), parameters.load_frozen(exp))
    found = measure({"coprocessor": coprocessor.params})
    lm = ld.AugmentedLM(ld.load_decoder("packaged"), coprocessor)
    prompts = [questions.Question(**row).prompt() for row in ROWS]
    replies = [questions.Question(**row).reply(False) for row in ROWS]
    for augment, behind, solved in ((True, "", 75), (False, "_decoder", 25)):
        logp = lm.logprobs(prompts, replies, augment=augment)[0]
        half = 3.1824463 * np.std(logp, ddof=1) / 2  # Student's t, 3 degrees of freedom
        assert found[f"validation_solved{behind}"] == solved
        figures = [found[f"validation_answer{end}{behind}"] for end in ("", "_low", "_high")]
        assert figures == pytest.approx(np.mean(logp) + np.array([0, -half, half]), rel=1e-5)
    assert asked == [(len(" on a mat\n"), "\n", 0.0)] * 2


@pytest.mark.slow
def test_a_mesh_says_the_same(config_of, write):
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.traces": 2, "mesh.tensor": 2}
    coprocessor = ld.load_coprocessor("packaged")
    found = []
    for changes, devices in (({}, jax.devices()[:1]), (mesh, None)):
        config = config_of(
            write(ROWS), **{"method.num_latents": coprocessor.num_latents}, **changes
        )
        exp = experiment.read(config, devices)
        measure = Answers(exp, read_questions(exp), parameters.load_frozen(exp))
        found.append(measure({"coprocessor": coprocessor.params}))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_benchmark_says_the_same(config_of, write, tmp_path, one_device):
    """Of the same problems after the last step, with latents that learned the frequent one."""
    prompts = [f"{a} {b}" for a in ("the cat", "a dog", "rain") for b in ("sat", "ran", "fell")]
    rows = []
    for number, prompt in enumerate(prompts):
        rows.append({"question": prompt, "answer": "7" if number % 3 == 0 else "a mat"})
    source = write(rows)
    changes = {
        "data.token_files": str(tmp_path / "tokens"),
        "method.prompt_end": questions.PROMPT_END,
        "method.num_ahead": 8,  # the whole answer and the end of its line
        "train.steps": 70,
        "train.checkpoint_every": 70,
        "train.validate_every": 70,
        "method.visible_text": 6,
    }
    prepare.prepare(config_of(source), changes["data.token_files"])
    train.train(config_of(source, **changes), str(tmp_path / "run"))
    run_command(
        "benchmark",
        benchmarks=source,
        workdir=tmp_path / "run",
        model="decoder,augmented",
        out=tmp_path / "out",
    )
    written = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    row = workdirs.rows_of(tmp_path / "run")[-1]
    for found, behind in zip(written["rows"], ("_decoder", ""), strict=True):
        for key, end in (("value", ""), ("low", "_low"), ("high", "_high")):
            assert row[f"validation_solved{end}{behind}"] == pytest.approx(found[key])
            answer = found[f"answer_logp{end}"]
            assert row[f"validation_answer{end}{behind}"] == pytest.approx(answer, rel=1e-4)
    assert 0 == row["validation_solved_decoder"] < row["validation_solved"] < 100


def test_of_several_processes_none_asks(config_of, write, monkeypatch, capsys):
    exp = experiment.read(config_of(write(ROWS)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert read_questions(exp) == [] and "not asked" in capsys.readouterr().out
