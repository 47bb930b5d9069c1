"""The words for a run: all in which it differs from others, and no more."""

import pytest

from latent_delib.job import record
from latent_delib.results import comparisons, entries, evaluation, figures, runs
from tests.results.writers import FINGERPRINT, OURS, config, perplexity, tables_of


def labels(folder):
    """Returns the words for each evaluation below a folder."""
    found = runs.find([str(folder)]).perplexity
    return entries.labels(list(map(entries.entry_of, found)))


def frozen(evaluate=None, **method):
    """Returns the config of an evaluation of the frozen decoder."""
    return config("decoder", 0, **method) | {"evaluate": evaluate or {}}


def trained(steps, **optimizer):
    return config() | {"optimizer": {"name": "adamw"} | optimizer, "train": {"steps": steps}}


def in_dtype(dtype, **train):
    return config() | {"train": train, "compute": {"dtype": dtype}}


def write(folder, configs):
    """Writes an evaluation of each config, in this order; a decoder has no checkpoint."""
    for number, of in enumerate(configs):
        step = None if of["method"]["name"] == "decoder" else 180
        perplexity(folder / str(number), -1.0, of, step)


def on(source, size):
    """Returns the parts of a config that name a text and the size of an evaluation."""
    data = {"sources": [source], "token_files": source, "validation": ["x"]}
    return {"data": data, "evaluate": {"max_positions": size, "batch_size": size}}


X, Y = on("x", 8), on("y", 32)


@pytest.mark.parametrize(
    "configs, expected",
    [
        pytest.param(
            [frozen({"longer_prompt": 0}), frozen({"longer_prompt": 32})],
            [
                "frozen decoder",
                "frozen decoder, without the first 32 tokens that the decoder reads",
            ],
            id="control of a frozen decoder",
        ),
        pytest.param(
            [frozen(), frozen(prompt_end="Answer:")],
            ["frozen decoder", "frozen decoder, after 'Answer:'"],
            id="end of the prompt",
        ),
        pytest.param(
            [
                trained(180, learning_rate=1e-3),
                trained(180, learning_rate=1e-2),
                trained(400, learning_rate=1e-2),
                config(latents=4, ahead=8) | {"optimizer": {"name": "lion"}},  # alone in its words
            ],
            [
                f"{OURS}, optimizer.learning_rate 0.001, train.steps 180",
                f"{OURS}, optimizer.learning_rate 0.01, train.steps 180",
                f"{OURS}, optimizer.learning_rate 0.01, train.steps 400",
                OURS.replace("16 ahead", "8 ahead"),
            ],
            id="optimizer and schedule",
        ),
        pytest.param(
            [config() | X, config() | Y, frozen() | X, frozen() | Y],
            [
                f"{OURS}, data.sources ['x'], evaluate.max_positions 8",
                f"{OURS}, data.sources ['y'], evaluate.max_positions 32",
                "frozen decoder, evaluate.max_positions 8",
                "frozen decoder, evaluate.max_positions 32",
            ],
            id="text and evaluation",
        ),
        pytest.param(
            [
                in_dtype("float32"),
                in_dtype("float32", validate_every=10, wandb="x"),
                in_dtype("bfloat16"),
            ],
            [
                f"{OURS}, compute.dtype float32",
                f"{OURS}, compute.dtype float32",
                f"{OURS}, compute.dtype bfloat16",
            ],
            id="dtype, and nothing that changes no figure or that an older file lacks",
        ),
        pytest.param(
            [config(latent_penalty=1.0), config(latent_penalty=2.0)],
            [
                OURS.replace("placement after", "placement after, latent penalty 1.0"),
                OURS.replace("placement after", "placement after, latent penalty 2.0"),
            ],
            id="a key of a fork",
        ),
    ],
)
def test_what_differs_is_named(configs, expected, tmp_path):
    """Two runs cannot be told apart, or a label holds words that tell nothing."""
    write(tmp_path, configs)
    assert labels(tmp_path) == expected


def test_another_decoder_is_named(tmp_path):
    """Figures of different decoders look as if they could be compared."""
    for name, fingerprint in (("a", FINGERPRINT), ("b", "another")):
        perplexity(tmp_path / name, -1.0, fingerprint=fingerprint)
    of = f"{OURS}, of decoder packaged"
    assert labels(tmp_path) == [f"{of} (ab12cd34ef56)", f"{of} (another)"]


def test_a_key_of_a_fork_at_its_value_in_older_runs_is_not_named(tmp_path, monkeypatch):
    """A run of the fork without the change is not on one line with the runs before it."""
    monkeypatch.setitem(record.BEFORE, "method.latent_penalty", 0.0)
    write(tmp_path, [config(), config(latent_penalty=0.0)])
    assert labels(tmp_path) == [OURS, OURS]


def test_the_tables_use_these_words(tmp_path):
    """Runs that are told apart in one table look alike in another."""
    write(tmp_path, [config() | X, config() | Y])
    by_name = tables_of(tmp_path)
    expected = set(labels(tmp_path))
    assert {row[0] for row in by_name["0_runs"]} == expected
    assert {row[1] for row in by_name["11_every_method"]} == expected


def test_a_control_of_a_frozen_decoder_is_of_no_kind(tmp_path):
    """A decoder that reads less text is shown as the frozen decoder of a table."""
    write(tmp_path, [frozen(), frozen({"longer_prompt": 32})])
    found = entries.entries(runs.find([str(tmp_path)]))
    assert [comparisons.kinds_of(entry) for entry in found] == [{"decoder"}, set()]


@pytest.mark.parametrize(
    "method, words",
    [
        (
            {"prompt_end": "Answer:"},
            "after 'Answer:', distilled with weight 0.5, without the steps",
        ),
        ({"visible_text": 8}, "8 tokens of the text visible, distilled with weight 0.5"),
    ],
)
def test_the_heading_of_an_evaluation_names_the_text(method, words):
    """`evaluate` does not say where a method predicts, or how much its decoder sees."""
    about = {"step": 4, "pieces": 2, "documents": 2, "num_works": 2}
    of = config(distill=0.5, **method) | {"evaluate": {}}
    heading = evaluation.as_text(about | {"interval_over": "works", "sets": {}, "config": of})
    assert f", placement after, {words}, 2 pieces" in heading


@pytest.fixture
def lines(tmp_path):
    """lines(folder, ...) -> the lines drawn of the runs below: label -> numbers of latents.

    The folders are 8 and 16, with runs of as many latents on two texts, and resized, with runs of
    as many on one text but of different layers.
    """
    for latents in (8, 16):
        for text in ("seen", "unseen"):
            of = config(latents=latents) | {"data": {"validation": [text]}}
            perplexity(tmp_path / str(latents) / text, -1.0, of)
    for layers, latents in ((1, 8), (2, 16)):
        of = config("resized", latents, coprocessor={"num_layers": layers})
        of["data"] = {"validation": ["seen"]}
        perplexity(tmp_path / "resized" / str(layers), -1.0, of)

    def drawn(*folders):
        found = runs.find([str(tmp_path / folder) for folder in folders])
        by_label = {}
        for name, line in figures.lines_by_latents(found.perplexity).items():
            by_label[name.partition(": ")[2]] = [each.method["num_latents"] for each in line]
        return by_label

    return drawn


def test_runs_of_different_text_or_size_are_no_line(lines):
    """A line by latents joins runs on different text, or coprocessors of different size."""
    drawn = lines("8", "16", "resized")
    assert drawn == {f"{OURS}, on seen": [8, 16], f"{OURS}, on unseen": [8, 16]}


def test_runs_alone_are_drawn_where_there_is_no_line(lines):
    """Nothing is drawn, or coprocessors of different size are joined."""
    drawn = lines("8", "resized")
    rest = "16 ahead tokens, step 180, seed 3, on seen"
    assert drawn[f"resized, placement after, coprocessor of num layers 1, {rest}"] == [8]
    assert drawn[f"resized, placement after, coprocessor of num layers 2, {rest}"] == [16]


@pytest.mark.parametrize(
    "works, over", [(3, "over works (only 3: it holds in 75 % of cases)"), (5, "over works")]
)
def test_an_interval_over_few_works_says_how_often_it_holds(works, over):
    """With three files a reader takes the interval for one of 95 %."""
    about = {"step": 4, "pieces": 2, "documents": 9, "num_works": works}
    row = {"n": 1, "tokens": 9, "change_percent": -1.0, "change_low": -2.0, "change_high": 0.5}
    row |= {"decoder_ppl": 3.0, "augmented_ppl": 2.9}
    part = {"interval_over": "works", "rows": [row], "works": {}}
    of = config() | {"evaluate": {}}
    text = evaluation.as_text(about | part | {"sets": {"x": about | part}, "config": of})
    assert text.splitlines()[1].endswith(f"95 % interval {over}")
