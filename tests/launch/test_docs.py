"""The commands that the pages print: their files and keys are there, and on a slice every chip gets a sequence."""

import ast
import importlib
import math
import re
import shlex
from pathlib import Path

import pytest

from latent_delib.job import experiment

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "launch/README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


def commands():
    """Every command with a config file, as its words; a loop's or a grid's own forms are left out."""
    found = {}
    for page in PAGES:
        for line in (ROOT / page).read_text().replace("\\\n", " ").splitlines():
            if line.startswith("    ") and re.search(r"--config=configs/[a-z]", line):
                words = shlex.split(line.replace("$(", "(").replace('"$', '"'), comments=True)
                found[f"{page}: {' '.join(words)}"] = words
    return found


def config_of(words):
    """What the words of a command make of the file they name."""
    path, _, argument = next(w for w in words if w.startswith("--config=")).removeprefix("--config=").partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(*filter(None, [argument]))
    for word in words:
        if word.startswith("--config."):
            key, _, value = word.removeprefix("--config.").partition("=")
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pass  # text without quotes
            config.update_from_flattened_dict({key: value})
    return config


COMMANDS = commands()


def test_the_pages_have_commands():
    assert len(COMMANDS) > 10 and sum("--accelerator=" in name for name in COMMANDS) >= 4


@pytest.mark.parametrize("words", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_of_a_page(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_of(words)
    experiment.check(config)
    slices = [re.fullmatch(r"--accelerator=(?:v5litepod|v6e)-(\d+)", word) for word in words]
    devices = [re.fullmatch(r"--devices=(\d+)", word) for word in words]
    processes = [re.fullmatch(r"--processes=(\d+)", word) for word in words]
    chips = math.prod(int(m[1]) for m in (*slices, *devices, *processes) if m)
    axes = dict(config.mesh)
    axes["data"] = chips // math.prod(n for n in axes.values() if n > 0) if axes["data"] < 0 else axes["data"]
    shards = axes["data"] * axes["fsdp"]
    if any(slices):
        assert math.prod(axes.values()) == chips
    if chips > 1 and "latent_delib.train" in words:
        assert config.train.batch_size // config.train.accumulation % shards == 0
    if chips > 1 and "latent_delib.evaluate" in words:
        assert config.evaluate.batch_size % shards == 0
