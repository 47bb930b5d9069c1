"""The command over a file of prompts: what it writes is what the model says, in the order asked."""

import json
import shutil

import jax
import pytest

import latent_delib as ld
from latent_delib import generate
from latent_delib.job import build
from latent_delib.lm import load


def test_a_file_of_prompts(trained, decoder_folder, tmp_path, capsys, monkeypatch):
    asked = [{"prompt": "the cat\u2028", "seed": 3}, {"prompt": "a dog ran to the door when", "id": "x"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    (tmp_path / "in.jsonl").write_text(lines.replace('"x"', r'"x\ud83d"'))  # half a character, which UTF-8 lacks
    out = tmp_path / "folder" / "out.jsonl"
    options = dict(max_new_tokens=5, temperature=0.7, top_k=0, top_p=1.0, stop="", seed=11, every=0, delay=0)
    options |= dict(batch_size=2, prompt="", prompts=str(tmp_path / "in.jsonl"), out=str(out), no_augment=False)
    options |= dict(workdir=str(trained), step=None, coprocessor_devices=0, tensor=1, max_length=64, attention="auto")
    generate.main(type("Flags", (), options))
    found = [json.loads(line) for line in out.read_text().removesuffix("\n").split("\n")]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in asked]
    assert [row["seed"] for row in found] == [3, 12]  # its own, and the flag's with its place
    assert [row.get("id") for row in found] == [None, "x\ud83d"]  # what else a line holds stays
    lm = ld.AugmentedLM(ld.load_decoder(str(decoder_folder)), ld.load_coprocessor(str(trained)))
    for name, augment in (("decoder", False), ("augmented", True)):
        texts = lm.generate([r["prompt"] for r in asked], 5, temperature=0.7, seed=[3, 12], augment=augment)
        assert [row[name] for row in found] == texts
    assert [row["joined"] for row in found] == [[0], [0]] and "2 continuations are in" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["out.jsonl"]

    # The newest checkpoint, damaged where its weights are read, gives way to the one before, unless it was asked for.
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)
    (workdir / "checkpoints" / "4" / "trainable" / "_METADATA").unlink()
    forms, transformer = [], build.transformer

    def watched(*args, form="auto"):
        forms.append(form)
        return transformer(*args, form=form)

    monkeypatch.setattr(build, "transformer", watched)
    generate.main(type("Flags", (), options | {"workdir": str(workdir), "attention": "reference"}))
    assert set(forms) == {"reference"}
    assert "checkpoint 4 is damaged (trainable: no file _METADATA), checkpoint 2 is used" in capsys.readouterr().err
    lm = ld.AugmentedLM(lm.decoder, ld.load_coprocessor(trained, 2), attention="reference")
    texts = lm.generate([r["prompt"] for r in asked], 5, temperature=0.7, seed=[3, 12])
    assert [json.loads(line)["augmented"] for line in out.read_text().removesuffix("\n").split("\n")] == texts
    with pytest.raises(ld.UserError, match=r"4 is damaged \(.*\); name another step, one of \[2\]"):
        generate.main(type("Flags", (), options | {"workdir": str(workdir), "step": 4}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"no_augment": True, "every": 2}, "--every=2: says when latents join, and with --no_augment there are none"),
        ({"no_augment": True, "delay": 3}, "--delay=3: says when latents join"),
        ({"tensor": 3}, f"--tensor=3: does not divide the {jax.device_count()} devices of the decoder"),
        ({"tensor": 3, "coprocessor_devices": 7}, "--tensor=3: does not divide the 1 device of the decoder"),
        ({"coprocessor_devices": 8}, "--coprocessor_devices=8: this machine has 8 devices, and the decoder needs one"),
        ({"attention": "flash"}, "attention='flash': expected one of auto, reference, xla"),
    ],
)
def test_flags_that_do_not_fit(trained, monkeypatch, changes, words):
    """Before weights are loaded."""
    monkeypatch.setattr(load, "load_decoder", None)
    options = dict(max_new_tokens=5, temperature=0.0, top_k=0, top_p=1.0, stop="", seed=11, every=0, delay=0)
    options |= dict(batch_size=2, prompt="a", prompts="", out="", no_augment=False, workdir=str(trained), step=None)
    options |= dict(coprocessor_devices=0, tensor=1, max_length=64, attention="auto") | changes
    with pytest.raises(ld.UserError, match=words):
        generate.main(type("Flags", (), options))
