"""What a run is, as plain data, and what two runs differ in."""

import copy
import dataclasses
import json

import pytest

from configs import base
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.job.record import AGREE, FORMAT, Record


@pytest.fixture
def record() -> Record:
    config = json.loads(base.get_config().to_json_best_effort())
    return Record(
        config, "f" * 64, {"num_layers": 2}, {"tokenizer": "t" * 64, "files": ["a"]}, step=7
    )


def changed(record: Record, key: str, value) -> Record:
    """The same run with another value at a dotted key of its config."""
    config = copy.deepcopy(record.config)
    *rooms, name = key.split(".")
    inner = config
    for room in rooms:
        inner = inner[room]
    inner[name] = value
    return dataclasses.replace(record, config=config)


def test_a_checkpoint_gives_back_what_it_was_given(record):
    meta = json.loads(json.dumps(record.meta()))
    assert meta["format"] == FORMAT
    assert Record.from_meta(meta, "w") == record


def test_a_tuple_in_the_config_is_the_same_in_a_checkpoint(make_config):
    changes = {"method.name": "resized", "method.coprocessor": {"layer_pattern": ("global",)}}
    record = experiment.read(make_config(changes)).record
    assert Record.from_meta(json.loads(json.dumps(record.meta())), "w") == record


def test_a_meta_without_a_number_is_read(record):
    """As version 0.1 wrote it, before `method.max_delay` and `method.coprocessor`."""
    meta = json.loads(json.dumps(record.meta()))
    del (
        meta["format"],
        meta["config"]["method"]["max_delay"],
        meta["config"]["method"]["coprocessor"],
    )
    meta |= {"method.name": "cache_augmentation", "method.num_latents": 16}
    found = Record.from_meta(meta, "w")
    for purpose in AGREE:
        assert not record.differences(found, purpose), purpose
    assert found["method.max_delay"] == 0 and found["method.coprocessor"] == {}


def test_a_key_that_is_newer_than_a_run_had_one_value_in_it(record):
    """So a run from before delays, or from before other optimizers, cannot go on with them."""
    meta = json.loads(json.dumps(record.meta()))
    del meta["config"]["method"]["max_delay"], meta["config"]["optimizer"]["name"]
    older = Record.from_meta(meta, "w")
    other = changed(changed(record, "method.max_delay", 3), "optimizer.name", "adafactor")
    assert not record.differences(older, "resume")
    assert [d.key for d in other.differences(older, "resume")] == [
        "method.max_delay",
        "optimizer.name",
    ]


def test_a_key_whose_old_value_nobody_told_is_a_difference(record):
    newer = changed(record, "method.penalty", 100.0)
    assert [d.key for d in newer.differences(record, "resume")] == ["method.penalty"]


def test_a_newer_checkpoint_is_refused(record):
    with pytest.raises(
        UserError, match=f"w: checkpoint format {FORMAT + 1}, expected at most {FORMAT}"
    ):
        Record.from_meta(record.meta() | {"format": FORMAT + 1}, "w")


@pytest.mark.parametrize(
    "key, value, purposes",
    [
        ("method.num_latents", 3, {"resume", "evaluate", "same_training", "same_curve"}),
        (
            "method.coprocessor",
            {"num_layers": 1},
            {"resume", "evaluate", "same_training", "start", "same_curve"},
        ),
        ("method.num_ahead", 3, {"resume", "same_training"}),
        ("method.distill", 0.5, {"resume", "same_curve"}),
        ("method.lora_rank", 4, {"resume", "evaluate", "same_training", "same_curve"}),
        ("optimizer.b1", 0.5, {"resume", "same_training"}),
        ("seed", 3, {"resume", "same_training"}),
        ("train.batch_size", 3, {"resume", "same_training"}),
        ("data.weights", [2.0, 1.0], {"resume"}),
        ("data.seq_len", 64, {"resume", "same_training"}),
        ("train.steps", 3, set()),
        ("data.validation", ["other"], {"same_curve"}),
        ("evaluate.delay", 3, {"same_curve"}),
        ("evaluate.batch_size", 3, set()),
    ],
)
def test_each_purpose_names_its_differences(record, key, value, purposes):
    other = changed(record, key, value)
    for purpose in AGREE:
        found = record.differences(other, purpose)
        assert [d.key for d in found] == ([key] if purpose in purposes else []), purpose
        assert all(d.there == value for d in found)


def test_a_start_may_have_begun_with_another_run(record):
    assert not record.differences(changed(record, "method.start", "w/checkpoints/1"), "start")


def test_another_assistant_is_named_by_its_fingerprint(record):
    other = dataclasses.replace(record, assistant={"fingerprint": "0" * 64})
    with pytest.raises(UserError, match="method.assistant is 000000000000 there, None here"):
        record.require(other, "resume", "runs/x")
    assert Record.from_meta(json.loads(json.dumps(other.meta())), "w") == other
    result = json.loads(json.dumps(other.as_result("w/checkpoints/4")))
    assert Record.from_result(result) == dataclasses.replace(other, data={})


def test_another_decoder_and_tokenizer(record):
    other = dataclasses.replace(record, fingerprint="0" * 64, data={"tokenizer": "1" * 64})
    with pytest.raises(UserError) as error:
        record.require(other, "evaluate", "runs/x")
    assert str(error.value) == (
        "runs/x: decoder.fingerprint is 000000000000 there, ffffffffffff here; "
        "decoder.tokenizer is 111111111111 there, tttttttttttt here; "
        "use its values, or another --workdir"
    )
