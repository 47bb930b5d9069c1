"""Checks the pages: commands name files, flags and keys that exist; links lead somewhere.

On a slice, every chip of a printed command gets a sequence. README's Python block is run by
test_examples.py.
"""

import argparse
import ast
import importlib
import math
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from configs import paper
from latent_delib.job import experiment

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ARRAY = re.compile(r"(\w+)(\+?)=\((.*)\)")
MODULE = re.compile(r"(latent_delib|tools|benchmarks|examples)\.\w+")
SLICE = re.compile(r"--accelerator=(?:v5litepod|v6e)-(\d+)")
PARTS = [
    SLICE,
    re.compile(r"--slices=(\d+)"),
    re.compile(r"--devices=(\d+)"),
    re.compile(r"--processes=(\d+)"),
]


def code_lines(page: Path) -> list[str]:
    """Returns the indented lines of a page, continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def running_text(page: Path) -> str:
    """Returns a page without blocks of code, `code`, comments and the targets of links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.DOTALL)


def is_command(line: str) -> bool:
    """Tells whether a line starts a module or a script of ours, not a loop or an output."""
    starts = re.search(
        r"(^|\s)(-m (latent_delib|tools|benchmarks|examples)\.|\./launch/\w+\.sh)", line
    )
    return bool(starts) and not line.startswith(("for ", "perplexity"))


def words_of(line: str, arrays: dict[str, list[str]]) -> list[str]:
    """Returns a command's words: bash arrays filled in, brackets around options left out."""
    line = line.replace(" [", " ").replace("] ", " ").removesuffix("]")
    words = []
    for word in shlex.split(line, comments=True):
        array = re.fullmatch(r"\$\{(\w+)\[@\]\}", word)
        words += arrays[array[1]] if array else [word]
    return words


def commands() -> dict[str, list[str]]:
    """Returns the words of every command, by page and words."""
    found = {}
    for page in PAGES:
        arrays: dict[str, list[str]] = {}
        for line in code_lines(page):
            array = ARRAY.fullmatch(line)
            if array:
                name, more, body = array.groups()
                arrays[name] = (arrays[name] if more else []) + shlex.split(body)
            elif is_command(line):
                words = words_of(line, arrays)
                found[f"{page.relative_to(ROOT)}: {' '.join(words)}"] = words
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_stands_in_running_text(page):
    """A paragraph was wrapped together with the commands after it, which nobody can paste."""
    found = re.findall(
        r"^.*(?:python -m |\./launch/\w|--\w+=| \\ ).*$", running_text(page), re.MULTILINE
    )
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_table_stands_in_running_text(page):
    """A table was wrapped as if it were a paragraph."""
    found = re.findall(r"^.*[^|\s:-].*\|---.*$", running_text(page), re.MULTILINE)
    assert found == []


def config_of(words: list[str]):
    """Returns the config that the words of a command make of the file they name."""
    file = next(word.removeprefix("--config=") for word in words if word.startswith("--config="))
    path, _, argument = file.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(argument) if argument else module.get_config()
    for word in words:
        if word.startswith("--config."):
            key, _, value = word.removeprefix("--config.").partition("=")
            config.update_from_flattened_dict({key: parsed(value)})
    return config


def parsed(value: str):
    """Returns the value of --config.KEY=VALUE: a literal of Python, or text without quotes."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def anchors(page: Path) -> set[str]:
    """Returns the names that GitHub gives a page's headings, for links to them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(module: str) -> set[str]:
    """Returns the flags that a command declares at its end, in `commands.run(...)`."""
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    runs = [call for call in calls if ast.unparse(call.func) == "commands.run"]
    return {keyword.arg for call in runs for keyword in call.keywords}


class Stop(Exception):
    """Ends a benchmark where it would read its command line."""


def flags_of_benchmark(module: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Returns the flags of a module of benchmarks, by starting it as far as their reading."""
    found: set[str] = set()

    def stop(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
        found.update(word.removeprefix("--") for word in parser._option_string_actions)
        raise Stop

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(Stop):
        importlib.import_module(module).main()
    return found


COMMANDS = commands()
WITH_CONFIG = {
    name: words for name, words in COMMANDS.items() if re.search(r"--config=configs/[a-z]", name)
}
EXPERIMENTS = {
    word
    for words in COMMANDS.values()
    for word in words
    if re.fullmatch(rf"({'|'.join(paper.PROTOCOLS)})/\w+(@\d)?", word)
} | {name for page in PAGES for name in re.findall(r"paper\.py:([a-z]\w*/\w+)", page.read_text())}


def test_the_pages_have_commands():
    assert len(COMMANDS) > 40
    assert sum("--accelerator=" in name for name in COMMANDS) >= 4


@pytest.mark.parametrize("words", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_names_what_exists(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script in (word for word in words if word.startswith("./launch/")):
        assert Path(script).is_file()
    modules = [word for word in words if MODULE.fullmatch(word)]
    for module in modules:
        assert Path(module.replace(".", "/") + ".py").is_file()
    if not modules:
        return
    given = words[words.index(modules[0]) + 1 :]
    names = {word[2:].partition("=")[0] for word in given if re.match(r"--\w", word)}
    if modules[0].startswith(("benchmarks.", "examples.")) and names:
        known = flags_of_benchmark(modules[0], monkeypatch)
    else:
        known = flags_of(modules[0])
    assert {name for name in names if not name.startswith("config.")} <= known | {"help"}


@pytest.mark.parametrize("words", WITH_CONFIG.values(), ids=list(WITH_CONFIG))
def test_a_config_is_one_that_runs(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_of(words)
    experiment.check(config)
    counts = [re.fullmatch(part, word) for part in PARTS for word in words]
    chips = math.prod(int(count[1]) for count in counts if count)
    axes = dict(config.mesh)
    if axes["data"] < 0:
        axes["data"] = chips // math.prod(size for size in axes.values() if size > 0)
    shards = axes["data"] * axes["fsdp"]
    if any(SLICE.fullmatch(word) for word in words):
        assert math.prod(axes.values()) == chips
    if chips > 1 and "latent_delib.train" in words:
        assert config.train.batch_size // config.train.accumulation % shards == 0
    if chips > 1 and "latent_delib.evaluate" in words:
        assert config.evaluate.batch_size % shards == 0


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_an_experiment_is_in_the_table(name):
    experiment.check(paper.get_config(name.partition("@")[0]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def where(name: str) -> Path | None:
    """Returns the file that a page names, below root, package or tests; None without one."""
    paths = [folder / name for folder in (ROOT, ROOT / "latent_delib", ROOT / "tests")]
    return next((path for path in paths if path.exists()), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    for name in re.findall(r"`(\w[\w/.]*/\w+\.(?:py|sh|ipynb))`", text):
        assert where(name), name
    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", where(file).read_text()), f"{name} in {file}"


def test_the_version_is_one():
    said = {
        "latent_delib/__init__.py": r'__version__ = "(.+)"',
        "CITATION.cff": r"\nversion: (.+)",
        "CHANGELOG.md": r"## \[(.+)\]",  # the newest, which is first
    }
    versions = {re.search(pattern, (ROOT / name).read_text())[1] for name, pattern in said.items()}
    assert len(versions) == 1
