"""The model card of an exported coprocessor: the decoder that it is for."""

import pytest

from latent_delib.job.record import Record
from latent_delib.results.card import card
from tests.results.writers import FINGERPRINT

METHOD = {"name": "cache_augmentation", "num_latents": 8, "placement": "after"}
MODEL = "hf:google/gemma-2-2b"


@pytest.mark.parametrize(
    "decoder, origin, base_model, command",
    [
        ("runs/decoder", {}, None, None),
        (MODEL, {"source": MODEL, "dtype": ""}, "google/gemma-2-2b", None),
        (
            "runs/decoder",
            {"source": f"{MODEL}@abc", "dtype": "bfloat16"},
            "google/gemma-2-2b",
            f"python -m latent_delib.convert --source={MODEL}@abc --out=DECODER --dtype=bfloat16",
        ),
        (
            "runs/decoder",
            {"source": f"{MODEL}@abc", "dtype": ""},
            "google/gemma-2-2b",
            f"python -m latent_delib.convert --source={MODEL}@abc --out=DECODER",
        ),
    ],
)
def test_the_decoder_and_how_to_make_it(decoder, origin, base_model, command):
    lines = card(
        Record({"method": METHOD}, FINGERPRINT, step=10), decoder, FINGERPRINT, origin, None
    )
    lines = lines.splitlines()
    head = lines[1 : lines.index("---", 1)]
    named = [line.removeprefix("base_model: ") for line in head if line.startswith("base_model")]
    assert named == ([base_model] if base_model else [])
    commands = [line for line in lines if "latent_delib.convert" in line]
    assert commands == ([command] if command else [])
    path = MODEL if decoder == MODEL else "DECODER"
    assert f'decoder = ld.load_decoder("{path}")' in lines
    assert f"fingerprint `{FINGERPRINT}`, `{decoder}` where it was trained." in lines
