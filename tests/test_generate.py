"""The command over a file of prompts: what it writes is what the model says, in the order asked."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import pytest

import latent_delib as ld
from latent_delib import generate
from latent_delib.lm import decoding, load
from latent_delib.lm.sampling import Sampler
from tests.run_command import run_command


def run(**flags):
    return run_command(
        "generate", **{"max_new_tokens": 5, "batch_size": 2, "max_length": 64} | flags
    )


def rows(path):
    return [json.loads(line) for line in path.read_text().removesuffix("\n").split("\n")]


def test_a_file_of_prompts(trained, trained_lm, tmp_path, capsys):
    asked = [
        {"prompt": "the cat\u2028", "seed": 3},
        {"prompt": "a dog ran to the door when", "id": "x"},
    ]
    prompts = [row["prompt"] for row in asked]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    # half a character, which UTF-8 lacks
    (tmp_path / "in.jsonl").write_text(lines.replace('"x"', r'"x\ud83d"'))
    out = tmp_path / "folder" / "out.jsonl"
    flags = dict(prompts=tmp_path / "in.jsonl", out=out, temperature=0.7, seed=11)
    assert run(workdir=trained, **flags) == ""
    found = rows(out)
    assert [row["prompt"] for row in found] == prompts
    assert [row["seed"] for row in found] == [3, 12]  # its own, and the flag's with its place
    assert [row.get("id") for row in found] == [None, "x\ud83d"]  # what else a line holds stays
    for name, augment in (("decoder", False), ("augmented", True)):
        texts = trained_lm.generate(prompts, 5, temperature=0.7, seed=[3, 12], augment=augment)
        assert [row[name] for row in found] == texts
    assert [row["joined"] for row in found] == [
        [0],
        [0],
    ] and "2 continuations are in" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["out.jsonl"]

    # The newest checkpoint, damaged where its weights are read, gives way to the one before, unless
    # it was asked for.
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)
    (workdir / "checkpoints" / "4" / "trainable" / "_METADATA").unlink()
    assert run(workdir=workdir, **flags) == ""
    said = capsys.readouterr().err
    assert "checkpoint 4 is damaged (trainable: " in said and "checkpoint 2 is used" in said
    lm = ld.AugmentedLM(trained_lm.decoder, ld.load_coprocessor(trained, 2))
    assert [row["augmented"] for row in rows(out)] == lm.generate(
        prompts, 5, temperature=0.7, seed=[3, 12]
    )
    assert "name another step, one of [2]" in run(workdir=workdir, step=4, **flags)


def test_the_continuation_of_one_prompt_appears_as_it_is_decoded(trained, trained_lm, capsys):
    assert run(workdir=trained, prompt="the cat", temperature=0.7, seed=3) == ""
    expected = ""
    for name, augment in (("decoder", False), ("augmented", True)):
        (text,) = trained_lm.generate(["the cat"], 5, temperature=0.7, seed=[3], augment=augment)
        expected += f"--- {name}\nthe cat{text}\n"
    assert capsys.readouterr().out.endswith(expected)
    assert "more than max_length=6" in run(workdir=trained, prompt="the cat", max_length=6)
    assert capsys.readouterr().out == "", "nothing stands before the error on its line"


def test_a_decoder_that_has_moved(trained, trained_lm, decoder_folder, tmp_path, capsys):
    """A coprocessor from the Hub names the folder that its author had."""
    moved = shutil.copytree(decoder_folder, tmp_path / "moved")
    assert run(workdir=trained, decoder=moved, prompt="the cat", no_augment=True) == ""
    (text,) = trained_lm.generate(["the cat"], 5, augment=False)
    assert capsys.readouterr().out.endswith(f"--- decoder\nthe cat{text}\n")
    said = run(workdir=trained, decoder="packaged", prompt="the cat")
    for words in ("--decoder=packaged: has fingerprint ", trained_lm.decoder.fingerprint[:12]):
        assert words in said

    record = load.read_record(str(trained))
    gone = record.config | {"decoder": record.config["decoder"] | {"path": "gone"}}
    record = dataclasses.replace(record, config=gone)
    assert load.decoder_of(str(trained), record, str(moved)) == str(moved)
    with pytest.raises(ld.UserError, match="gone.*take --decoder=PATH"):
        load.decoder_of(str(trained), record)


TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}
"""


def test_a_prompt_is_a_users_message(trained, decoder_folder, tmp_path, monkeypatch, capsys):
    """A line of a file may hold a whole conversation."""
    assert "has no chat_template.jinja beside it" in run(workdir=trained, prompt="a", chat=True)
    decoder = tmp_path / "decoder"
    shutil.copytree(decoder_folder, decoder)
    (decoder / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(load, "decoder_of", lambda *_: str(decoder))
    lm = ld.AugmentedLM(ld.load_decoder(decoder), ld.load_coprocessor(trained))
    asked = [{"role": "user", "content": "the cat"}]
    longer = [*asked, {"role": "assistant", "content": "ran"}, *asked]
    prompts = [lm.tokenizer.chat(asked), lm.tokenizer.chat(longer)]
    texts = lm.generate(prompts, 5, seed=[7, 8])
    lines = [{"prompt": "the cat", "id": 1}, {"messages": longer}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = dict(workdir=trained, prompts=tmp_path / "in.jsonl", seed=7, chat=True)
    assert run(out=tmp_path / "out.jsonl", **flags) == ""
    found = rows(tmp_path / "out.jsonl")
    assert [row["augmented"] for row in found] == texts
    assert found[0]["prompt"] == "the cat" and found[1]["messages"] == longer
    capsys.readouterr()
    assert run(workdir=trained, prompt="the cat", seed=7, chat=True) == ""
    assert capsys.readouterr().out.endswith(f"--- augmented\nthe cat\n\n{texts[0]}\n")


NO_PROMPT = 'expected a "prompt" that is text'


@pytest.mark.parametrize(
    "lines, words",
    [
        (b"", ": holds no prompts"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"prompt": "a"}\n{"prompt": \n', ':2: not JSON, expected {"prompt": TEXT}'),
        (b'{"prompt": "a"}\n\n', ":2: not JSON"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", ":1: not JSON"),
        (b'["a"]\n', f":1: {NO_PROMPT}"),
        (b'{"prompt": ""}\n', f":1: {NO_PROMPT}"),
        (b'{"messages": [], "prompt": "a"}', f":1: {NO_PROMPT}"),
        (b'{"messages": []}', ":1: messages: is empty"),
        (b'{"messages": [{"role": "user"}]}', ":1: messages[0]="),
        # the mark is no mistake
        (b'\xef\xbb\xbf{"prompt": "a", "seed": true}', ":1: seed=True: expected a whole number"),
        (b'{"prompt": "a", "seed": -1}\n', ":1: seed=-1: expected at least 0"),
        (
            b'{"prompt": "a", "seed": 9223372036854775808}\n',
            ":1: seed=9223372036854775808: expected at most",
        ),
    ],
)
def test_lines_that_hold_no_request(lines, words, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines)
    with pytest.raises(ld.UserError) as caught:
        generate.read_requests(SimpleNamespace(prompt="", prompts=str(path), seed=0))
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_the_model_of_the_flags(trained):
    """Its form of attention; and its devices, the last of which are the coprocessor's."""
    flags = dict(workdir=str(trained), step=None, no_augment=False, every=0, delay=0, max_length=64)
    flags |= dict(decoder="", attention="reference", tensor=2, coprocessor_devices=2)
    lm = generate.load_model(SimpleNamespace(**flags))
    assert {aug.decoder.form for aug in (lm.plain, lm.aug, lm.aug_beside)} == {"reference"}
    assert (
        lm.mesh.shape["data"] == 3
        and lm.mesh.shape["tensor"] == lm.coprocessor_mesh.shape["tensor"] == 2
    )
    assert set(lm.coprocessor_mesh.devices.flat) == set(jax.devices()[-2:])


def test_every_field_of_the_sampler_is_a_flag(capsys):
    assert run_command("generate", help=True) == ""
    said = capsys.readouterr().out
    for field in dataclasses.fields(Sampler):
        assert f"--{field.name}: {field.metadata['help']}" in said


@pytest.mark.parametrize(
    "method, flags, words",
    [
        ({"every": 8}, {"delay": 8}, "delay=8: expected less than every=8"),
        ({"every": 8}, {"every": 4}, "every=4: latents join again after every 8 tokens"),
        ({"name": "inserted"}, {"delay": 1}, "delay=1: method 'inserted' writes keys"),
        ({"name": "inserted"}, {"coprocessor_devices": 1}, "(--coprocessor_devices): method"),
    ],
)
def test_a_rhythm_that_does_not_fit_the_method(trained, monkeypatch, method, flags, words):
    """Refused before weights are loaded."""
    record = load.read_record(str(trained))
    config = record.config | {"method": record.config["method"] | method}
    changed = dataclasses.replace(record, config=config)
    monkeypatch.setattr(load, "read_record", lambda *_: changed)
    monkeypatch.delattr(load, "load_decoder")
    assert words in run(workdir=trained, prompt="a", **flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"no_augment": True, "every": 2}, "--every=2: "),
        ({"no_augment": True, "delay": 3}, "--delay=3: "),
        ({"coprocessor_devices": 1, "delay": 3}, "--delay=3: with --coprocessor_devices"),
        ({"tensor": 3}, f"--tensor=3: expected a divisor of {jax.device_count()}"),
        ({"tensor": 3, "coprocessor_devices": 7}, "--tensor=3: expected a divisor of 1,"),
        ({"coprocessor_devices": 8}, "--coprocessor_devices=8: expected 0 to 7"),
        ({"coprocessor_devices": -1}, "--coprocessor_devices=-1: expected 0 to 7"),
        ({"attention": "flash"}, "attention='flash'"),
    ],
)
def test_flags_that_do_not_fit(trained, flags, words):
    assert run(**{"workdir": trained, "prompt": "a"} | flags).startswith(f"error: {words}")


def test_the_flags_reach_the_model(trained, trained_lm, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "the cat"}\n')
    flags = dict(workdir=trained, prompts=tmp_path / "in.jsonl", out=tmp_path / "out.jsonl", seed=3)
    options = {"temperature": 5.0, "top_k": 9, "every": 3, "delay": 1}
    (whole,) = trained_lm.continuations(["the cat"], 5, seed=[3], **options)
    stop = whole.text[-1]
    assert run(**flags, **options, stop=stop) == ""
    (row,) = rows(tmp_path / "out.jsonl")
    (expected,) = trained_lm.continuations(["the cat"], 5, seed=[3], stop=stop, **options)
    assert row["augmented"] == expected.text != whole.text
    assert row["joined"] == list(expected.joined) != [0]


def test_a_coprocessor_of_its_own_devices_is_asked_there(trained, monkeypatch):
    asked, write = [], decoding.write_beside
    monkeypatch.setattr(decoding, "write_beside", lambda *args: asked.append(1) or write(*args))
    assert run(workdir=trained, prompt="the cat", coprocessor_devices=2) == "" and asked
