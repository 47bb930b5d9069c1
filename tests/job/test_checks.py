"""Configs that no job can have: each is refused in one line that names the key."""

import pytest

from latent_delib import train
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job import checks, experiment, own_text

MISTAKES = [
    ({"method.lora_rank": -1}, "config.method.lora_rank=-1"),
    ({"method.name": "static_tokens", "method.lora_rank": 2}, "trains no matrix"),
    ({"method.name": "from_scratch", "method.lora_rank": 2}, "does not start from"),
    ({"method.name": "inserted"}, "config.method.placement='after'"),
    ({"method.name": "static_tokens", "method.every": 2}, "config.method.every=2: .* join once"),
    ({"method.name": "latent_tokens"}, "config.method.every=0: .* at least 1"),
    (
        {
            "method.name": "latent_tokens",
            "method.every": 4,
            "method.num_ahead": 4,
            "method.placement": "shared",
        },
        "config.method.every=4: expected less than config.method.num_ahead=4",
    ),
    (
        {"method.name": "latent_tokens", "method.every": 2, "method.placement": "overlay"},
        "config.method.placement='overlay': .* expected shared",
    ),
    (
        {"method.coprocessor": {"num_layers": 2}},
        "config.method.coprocessor: .* has the decoder's size",
    ),
    ({"method.name": "resized", "method.coprocessor": {"layers": 2}}, "config.method.coprocessor"),
    (
        {"method.name": "resized", "method.coprocessor": {"qkv_bias": True}},
        "config.method.coprocessor: no family has",
    ),
    ({"train.checkpoint_every": None}, "config.train.checkpoint_every=None: expected a value"),
    ({"data.weights": None}, "config.data.weights=None: expected a value"),
    ({"method.name": "assistant"}, "config.method.assistant is empty: method 'assistant'"),
    ({"method.assistant": "packaged"}, "config.method.assistant=packaged: .*has no assistant"),
    ({"method.start": "runs/x"}, "expected WORKDIR/checkpoints/STEP"),
    (
        {"method.name": "joint", "method.start": "w/checkpoints/1", "method.lora_rank": 2},
        "config.method.start=w/checkpoints/1: adapters of a decoder can be added",
    ),
    ({"method.start": "checkpoints/1"}, "expected WORKDIR/checkpoints/STEP"),
    ({"evaluate.swap": True, "evaluate.batch_size": 1}, "config.evaluate.swap"),
    (
        {"method.name": "static_tokens", "evaluate.swap": True},
        "config.evaluate.swap=True: method 'static_tokens'",
    ),
    (
        {"method.name": "decoder", "evaluate.delay": 2},
        "config.evaluate.delay=2: method 'decoder' writes no latents",
    ),
    (
        {"method.name": "pause_tokens", "method.max_delay": 1},
        "config.method.max_delay=1: method 'pause_tokens'",
    ),
    ({"method.max_delay": 31}, "config.method.max_delay=31: expected at most 30, so that"),
    ({"method.distill": 1.5}, "config.method.distill=1.5: expected at least 0 and at most 1"),
    ({"method.distill": -0.5}, "config.method.distill=-0.5"),
    ({"method.distill": 0.5, "method.name": "joint"}, "distill=0.5: method 'joint' trains the"),
    ({"method.distill": 0.5, "method.name": "decoder"}, "distill=0.5: method 'decoder' trains"),
    ({"method.distill": 0.5}, "config.method.prompt_end='', expected 'Answer:'"),
    (
        {"method.name": "decoder", "method.visible_text": 8},
        "config.method.visible_text=8: method 'decoder' has no latents; leave it 0",
    ),
    (
        {"method.name": "latent_tokens", "method.placement": "shared", "method.visible_text": 8},
        "config.method.visible_text=8: method 'latent_tokens' has latents that recur; leave it 0",
    ),
    (
        {"evaluate.swap": True, "method.name": "inserted", "method.placement": "overlay"},
        "config.evaluate.swap=True: method 'inserted' writes keys",
    ),
    (
        {"evaluate.delay": 1, "method.name": "inserted", "method.placement": "overlay"},
        "config.evaluate.delay=1: method 'inserted' writes keys",
    ),
    (
        {"method.max_delay": 1, "method.name": "inserted", "method.placement": "overlay"},
        "config.method.max_delay=1: method 'inserted' writes keys",
    ),
    (
        {"evaluate.longer_prompt": 31, "evaluate.max_length": 32},
        "config.evaluate.longer_prompt=31: expected at most 30",
    ),
]


@pytest.mark.parametrize("change, said", MISTAKES)
def test_keys_that_no_job_can_have_are_named(make_config, change, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        experiment.read(make_config(change))


def test_a_teacher_needs_steps_to_read(make_config, sources, tmp_path):
    """In the text that is trained on, and in that of the validation."""
    (tmp_path / "a.jsonl").touch()
    with_steps = (f"qa_steps:{tmp_path}/a.jsonl",)
    distilled = {"method.distill": 0.5, "method.prompt_end": "Answer:"}
    both = distilled | {"data.sources": with_steps, "train.validate_every": 1}
    for change, field in ((distilled, "sources"), (both, "validation")):
        config = make_config(change)
        experiment.read(config)  # as a dry run does
        with pytest.raises(
            UserError, match=rf"distill=0.5: no .* steps in .* config.data.{field};"
        ):
            train.train(config, str(tmp_path / "workdir"))
    config = make_config(distilled | {"data.token_files": ""})
    with pytest.raises(UserError, match=r"no .* steps in .* config.data.sources"):
        own_text.use_text(config, sources["train"], with_steps[0])
        train.check(config, str(tmp_path / "workdir"))
    assert not (tmp_path / "workdir").exists()


def test_a_row_has_text_to_hide(make_config):
    length = make_config().data.seq_len
    with pytest.raises(UserError, match=rf"visible_text={length}: expected at most {length - 1}"):
        experiment.read(make_config({"method.visible_text": length}))


def test_a_teacher_of_hidden_text_needs_no_steps(make_config):
    config = make_config({"method.distill": 0.5, "method.visible_text": 8})
    exp = experiment.read(config)
    checks.check_steps(config)
    assert exp.steps_end == () and exp.aug.visible_text == 8


@pytest.mark.parametrize(
    "row, change, said",
    [
        ({"has_matrices": False}, {"method.lora_rank": 2}, "trains no matrix"),
        ({"starts_random": True}, {"method.lora_rank": 2}, "does not start from"),
        ({"own_size": True}, {"method.lora_rank": 2}, "does not start from"),
        ({"reads_text": False}, {"method.max_delay": 2}, "no latents that depend on a text"),
        ({"reads_text": False}, {"evaluate.delay": 2}, "no latents that depend on a text"),
        ({"writes_keys": True}, {}, "config.method.placement='after'"),
        ({"recurs": True}, {"method.placement": "overlay"}, "do not depend on the text"),
        (
            {"writes_keys": True},
            {"method.placement": "overlay", "evaluate.swap": True},
            "config.evaluate.swap",
        ),
    ],
)
def test_the_row_of_a_new_method_says_what_is_allowed(make_config, monkeypatch, row, change, said):
    monkeypatch.setitem(METHODS, "new", METHODS["cache_augmentation"]._replace(**row))
    with pytest.raises(UserError, match=said):
        experiment.read(make_config({"method.name": "new"} | change))
