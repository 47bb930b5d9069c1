"""A job that distils: trained, validated, evaluated; on a mesh as on one device."""

import dataclasses
import json

import numpy as np
import pytest
import workdirs

from latent_delib import evaluate, prepare, train
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.job import plan as planning
from latent_delib.job.validation import Validation, read_held_out
from latent_delib.nn.sizes import SIZES

WORDS = ("cat", "sat", "mat", "dog", "ran", "door", "rain", "fell", "green", "hills")
MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.traces": 2, "mesh.tensor": 2}
FIGURES = ("validation_loss", "validation_loss_decoder")


def write_questions(file, count, seed):
    """A question names words, its steps their order turned round, its answer the last one."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = draw.choice(WORDS, 3).tolist()
        steps = " ".join(reversed(words))
        rows.append({"question": " ".join(words), "steps": steps, "answer": words[-1]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def make(make_config, tmp_path_factory):
    """make(changes) -> the config of a job on such questions, whose tokens are prepared."""
    folder = tmp_path_factory.mktemp("questions")
    for seed, split in enumerate(("train", "test")):
        write_questions(folder / f"{split}.jsonl", 80, seed)
    changes = {
        "decoder.path": "",  # random weights; the tiny tokenizer joins tokens over a line's end
        "decoder.tokenizer": "packaged",
        "decoder.architecture": dataclasses.asdict(SIZES["gemma2_test"]) | {"vocab_size": 1024},
        "method.placement": "overlay",
        "method.prompt_end": "Answer:",
        "method.distill": 0.5,
        "data.sources": (f"qa_steps:{folder}/train.jsonl",),
        "data.validation": (f"qa_steps:{folder}/test.jsonl",),
        "data.seq_len": 96,
        "data.token_files": str(folder / "tokens"),
        "train.validate_every": 2,
        "evaluate.max_length": 96,
    }
    prepare.prepare(make_config(changes), str(folder / "tokens"))
    return lambda more=None: make_config(changes | (more or {}))


@pytest.fixture(scope="module")
def distilled(make, tmp_path_factory):
    """The workdir of the job, trained to its end on eight devices that split the rows."""
    workdir = tmp_path_factory.mktemp("distilled")
    train.train(make(), str(workdir))
    return workdir


@pytest.mark.slow
def test_it_learns_and_is_validated(make, distilled):
    """The plain decoder has neither steps nor latents; one that has both parts of the loss."""
    rows = workdirs.rows_of(distilled)
    assert rows[-1]["validation_loss"] < rows[1]["validation_loss"]
    exp = experiment.read(make())
    plan = planning.make(exp)
    state, frozen = train.place_state(exp, plan, None)
    figures = {}
    for distill in (0.25, 0.5, 0.75):
        one = experiment.read(make({"method.distill": distill}))
        held_out = read_held_out(one)
        validation = Validation(one, planning.make(one), held_out, frozen, state.trainable)
        figures[distill] = validation(state.trainable)
    for name in FIGURES:
        low, middle, high = (figures[distill][name] for distill in figures)
        assert low != high and middle == pytest.approx((low + high) / 2, rel=1e-5)
    assert rows[-1]["validation_loss_decoder"] == pytest.approx(middle, rel=1e-5)


@pytest.mark.slow
def test_a_mesh_and_parts_change_nothing(make, distilled, tmp_path):
    train.train(make(MESH | {"train.accumulation": 2}), str(tmp_path))
    workdirs.assert_close(tmp_path, distilled, *FIGURES)


@pytest.mark.slow
def test_it_is_evaluated_without_the_steps(make, distilled, tmp_path):
    """On the same tokens as where the source has no steps."""
    plain = make()["data"]["validation"][0].replace("qa_steps:", "qa:")
    alone = make({"data.validation": (plain,), "data.token_files": "", "method.distill": 0.0})
    results = []
    for name, config in (("steps", make()), ("alone", alone)):
        evaluate.evaluate(config, str(distilled), str(tmp_path / name))
        results.append(json.loads((tmp_path / name / "perplexity.json").read_text()))
    for found, expected in zip(*(result["rows"] for result in results), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_another_weight_does_not_go_on(make, distilled):
    with pytest.raises(UserError, match=r"method.distill is 0.5 there, 1.0 here"):
        train.train(make({"method.distill": 1.0, "train.steps": 6}), str(distilled))
