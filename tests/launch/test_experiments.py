"""The table of experiments that paper.sh runs, configs/paper.py."""

from types import ModuleType

import jax
import pytest
from ml_collections import ConfigDict

from configs import base, coconut, hops_curriculum, paper
from latent_delib.delib.methods import METHODS
from latent_delib.job import experiment

EXCEPT_DISTILLED = [name for name in paper.EXPERIMENTS if name != "distilled"]  # of hops alone


@pytest.mark.parametrize("protocol", paper.PROTOCOLS)
def test_every_experiment_is_a_config_that_can_run(protocol: str) -> None:
    """With random weights where a protocol's decoder is made elsewhere."""
    for name in paper.EXPERIMENTS:
        if name == "distilled" and protocol != "hops":  # it needs questions with steps
            continue
        if f"{protocol}/{name}" == "plus_minus/latent_tokens":  # its answers are too short
            continue
        c = paper.get_config(f"{protocol}/{name}")
        if c.decoder.path != "packaged":
            c.decoder.path, c.decoder.tokenizer = "", "packaged"
        if c.method.assistant:
            c.method.assistant = "packaged"
        experiment.read(c, jax.devices()[:1])


def test_every_method_has_an_experiment() -> None:
    """A new method needs a row of `paper.EXPERIMENTS`."""
    named = {paper.get_config(f"lab/{name}").method.name for name in EXCEPT_DISTILLED}
    assert named == set(METHODS)


@pytest.mark.parametrize("module, method", [(coconut, "feedback"), (hops_curriculum, "sequential")])
def test_a_curriculum_is_a_config_that_can_run(module: ModuleType, method: str) -> None:
    c = module.get_config()
    if c.decoder.path != "packaged":
        c.decoder.path, c.decoder.tokenizer = "", "packaged"
    assert experiment.read(c, jax.devices()[:1]).aug.method == method


@pytest.mark.parametrize("protocol", paper.PROTOCOLS)
def test_a_run_that_is_stopped_keeps_its_curve(protocol: str) -> None:
    """Every checkpoint that is evaluated stays, whatever else a signal saves between them."""
    for name in ("overlay", "adapt_decoder"):
        train = paper.get_config(f"{protocol}/{name}").train
        assert (
            train.steps % train.checkpoint_every == 0 and train.keep_every == train.checkpoint_every
        )


def flat(config: ConfigDict, above: str = "") -> dict[str, object]:
    """Returns the keys of a config, "train.steps", and their values."""
    found: dict[str, object] = {}
    for key, value in config.items():
        found |= (
            flat(value, f"{above}{key}.") if isinstance(value, ConfigDict) else {above + key: value}
        )
    return found


def test_a_row_says_all_that_an_experiment_changes() -> None:
    for name, row in paper.EXPERIMENTS.items():
        protocol = "hops" if name == "distilled" else "lab"
        c, overlay = (flat(paper.get_config(f"{protocol}/{each}")) for each in (name, "overlay"))
        changed = {key for key in c if c[key] != overlay.get(key)}
        if name == "pretrain":
            changed -= paper.PROTOCOLS["lab"].pretrain.keys()
        assert changed <= row.keys() | {"method.coprocessor.num_layers", "train.keep_every"}, name
        assert name in ("overlay", "pretrain") or changed
    of_base, overlay = flat(base.get_config()), flat(paper.get_config("lab/overlay"))
    settings = paper.PROTOCOLS["lab"].settings
    changed = {key for key in of_base if of_base[key] != overlay[key]}
    derived = {"method.placement", "data.token_files", "train.keep_every"}
    assert changed <= settings.keys() | derived
    assert paper.get_config("lab/half").method.coprocessor.num_layers == 1
    start = paper.get_config("lab/adapt_coprocessor").method.start
    assert start == "runs/paper/lab/overlay@0/checkpoints/8000"


def test_latents_after_every_4_tokens_need_longer_answers() -> None:
    with pytest.raises(ValueError, match="too short"):
        paper.get_config("plus_minus/latent_tokens")


@pytest.mark.parametrize("name", ["overlay", "lab/nothing", "c/overlay", ""])
def test_a_config_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="PROTOCOL/EXPERIMENT.* lab_gpu, .* overlay_32"):
        paper.get_config(name)
