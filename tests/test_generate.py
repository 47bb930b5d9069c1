"""The command over a file of prompts: what it writes is what the model says, in the order asked."""

import json

import jax
import pytest

import latent_delib as ld
from latent_delib import generate


def test_a_file_of_prompts(trained, decoder_folder, tmp_path, capsys):
    asked = [{"prompt": "the cat\u2028", "seed": 3}, {"prompt": "a dog ran to the door when", "id": "x"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    (tmp_path / "in.jsonl").write_text(lines.replace('"x"', r'"x\ud83d"'))  # half a character, which UTF-8 lacks
    out = tmp_path / "folder" / "out.jsonl"
    options = dict(max_new_tokens=5, temperature=0.7, top_k=0, top_p=1.0, stop="", seed=11, every=0, delay=0)
    options |= dict(batch_size=2, prompt="", prompts=str(tmp_path / "in.jsonl"), out=str(out), no_augment=False)
    options |= dict(workdir=str(trained), step=None, coprocessor_devices=0, tensor=1, max_length=64)
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
    with pytest.raises(ld.UserError, match="--every, --delay, --coprocessor_devices: of latents"):
        generate.main(type("Flags", (), options | {"no_augment": True, "every": 2}))
    with pytest.raises(ld.UserError, match=f"--tensor=3: does not divide the {jax.device_count()} devices"):
        generate.main(type("Flags", (), options | {"tensor": 3}))
