"""Benchmarks: the adapter against lm-eval's `hf` and AugmentedLM, the table, the command."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import datasets
import evaluate
import jax
import numpy as np
import pytest
import small
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.instance import Instance
from scipy import optimize

import latent_delib as ld
from latent_delib import benchmark
from latent_delib.data.questions import Question
from latent_delib.delib.methods import METHODS
from latent_delib.lm import load, scoring
from latent_delib.measure import harness, harness_tasks, scores, suites
from latent_delib.results import published
from tests.run_command import run_command
from tools import make_tasks

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "configs" / "benchmarks.py"))
STORED = json.loads((ROOT / "tests" / "golden" / "harness.json").read_text())
BOS = 2

# A few rows of three tasks, one of each kind.
ROWS = {
    "syllogism": {
        split: [
            {"question": f"the cat sat on {n} {end}", "choices": ["Yes", "No"], "gold": n % 2}
            for n in range(4)
        ]
        for split, end in (("train", "mats"), ("test", "hills"))
    },
    "chain_sum": {
        split: [{"question": f"the dog ran {n} {end}", "answer": str(n)} for n in range(4)]
        for split, end in (("train", "mats"), ("test", "hills"))
    },
    "held_out_text": {"test": [{"text": "rain fell over green hills " * n} for n in (1, 2, 5)]},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        make_tasks.write_task(folder, name, rows)
    return folder


def noisy(params, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x + 0.3 * draw.standard_normal(x.shape), np.float32), params
    )


@pytest.fixture(scope="module")
def lm(decoder_folder):
    """A decoder that does not repeat itself, and latents that are heard."""
    found = ld.load_decoder(str(decoder_folder))
    decoder = dataclasses.replace(found, params=noisy(found.params, 0))
    start = ld.init_coprocessor(decoder, 4)
    return ld.AugmentedLM(
        decoder, dataclasses.replace(start, params=noisy(start.params, 1)), max_length=96
    )


def instances(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


class Says:
    """A model that answers everything with the same, and remembers what it was asked."""

    max_length = 2048

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts, self.tails = tokenizer, [], []

    def logprobs(self, prompts, tails, *_):
        self.prompts, self.tails = prompts, tails
        return -np.arange(len(tails), dtype=np.float32), np.zeros(len(tails), bool)

    def generate(self, prompts, *_, **__):
        self.prompts = prompts
        return ["So the answer is 7."] * len(prompts)


@pytest.fixture
def says(lm):
    return Says(lm.tokenizer)


# Against lm-eval's own `hf` model: what tests/golden/make_harness.py stored.


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    return ld.AugmentedLM(ld.load_decoder(smollm2_folder))


@pytest.mark.slow  # its weights take 0.75 GB
@pytest.mark.parametrize(
    "name, first, count",
    [
        ("syllogism", 0, 24),
        ("next_sentence", 0, 24),
        ("gsm_symbolic", 0, 20),
        ("held_out_text", 3, 2),  # the first of them has some 4,500 tokens
        ("held_out_text", 4, 8),
    ],
)
def test_equals_the_harness_own_model(smollm2, tmp_path, name, first, count):
    stored, last = STORED[name], first + count
    make_tasks.write_task(
        tmp_path, name, stored["rows"] | {"test": stored["rows"]["test"][first:last]}
    )
    loaded = harness_tasks.load_local_task(name, str(tmp_path))
    (task,) = loaded["tasks"].values()
    if changed := stored["generation_kwargs"]:
        task.set_config("generation_kwargs", changed, update=True)
    samples = harness.run_tasks(harness.Adapter(smollm2), loaded, stored["shots"])
    found, expected = [[r[0] for r in s["resps"]] for s in samples], stored["answers"][first:last]
    assert [s["doc_id"] for s in samples] == list(range(count))
    if name == "gsm_symbolic":
        assert found == expected
    else:  # log-likelihoods, beside each whether it is what greedy decoding says
        found, expected = np.array(found, float), np.array(expected, float)
        print(f"{name}: largest difference {np.abs(found - expected).max():.1e}")
        of_sum = 1e-5 if name == "held_out_text" else 0  # sums over up to 6,000 tokens, float32
        np.testing.assert_allclose(found, expected, rtol=of_sum, atol=1e-3)


@pytest.mark.parametrize("name", STORED)
def test_figures_of_the_stored_answers_are_the_harness_own(says, monkeypatch, tmp_path, name):
    stored = STORED[name]
    make_tasks.write_task(tmp_path, name, stored["rows"])
    loaded = harness_tasks.load_local_task(name, str(tmp_path))
    answers = sum(stored["answers"], [])

    def replay(self, requests, **_):
        assert len(requests) == len(answers)
        return answers

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(harness.Adapter, kind, replay)
    samples = harness.run_tasks(harness.Adapter(says), loaded, stored["shots"])
    for metric, value in stored["metrics"].items():
        row = scores.summarize_scores(samples, metric.split(",")[0])
        scale = 100 if row["unit"] == "percent" else 1
        assert row["value"] / scale == pytest.approx(value, rel=1e-6)


# Against AugmentedLM.


def test_bos_stands_at_the_start_once(says):
    adapter, encode = harness.Adapter(says), says.tokenizer.encode
    ids = encode("the cat")
    assert adapter.tok_encode("the cat") == adapter.tok_encode("<s>the cat") == [BOS, *ids]
    assert adapter.tok_encode("the cat", add_special_tokens=False) == ids
    adapter.loglikelihood(
        instances("loglikelihood", ("the cat", " sat"), ("<s>the cat", " sat"), ("", "rain"))
    )
    assert says.prompts == [[BOS, *ids], [BOS, *ids], [BOS]]
    assert says.tails == [encode("the cat sat")[len(ids) :]] * 2 + [encode("rain")]
    adapter.generate_until(instances("generate_until", ("<s>the cat", {"until": ["\n"]})))
    assert says.prompts == [[BOS, *ids]]


def test_a_long_prompt_is_cut_behind_bos(says):
    says.max_length, text = 40, " ".join(["the cat sat on a mat and a dog ran to the door"] * 9)
    ids, adapter = says.tokenizer.encode(text), harness.Adapter(says)
    adapter.loglikelihood(instances("loglikelihood", (text, " rain")))
    assert [*says.prompts[0], *says.tails[0]] == [BOS, *says.tokenizer.encode(text + " rain")[-39:]]
    adapter.generate_until(
        instances("generate_until", (text, {"until": ["\n"], "max_gen_toks": 7}))
    )
    assert says.prompts == [[BOS, *ids[-32:]]]


@pytest.mark.parametrize(
    "context, expected", [("Q: why?\nA:", "Q: why?\nA: Think."), ("Q: why?\n", "Q: why?\nThink.")]
)
def test_zero_shot_cot_begins_the_answer(says, context, expected):
    adapter = harness.Adapter(says, False, cot="Think.")
    adapter.generate_until(instances("generate_until", (context, {"until": ["\n"]})))
    assert says.prompts == [[BOS, *says.tokenizer.encode(expected)]]


PAIRS = [
    (p, t)
    for p in ("the cat sat", "rain fell over")
    for t in (" on a mat", " green", " hills", " a")
]


def split(lm, pairs):
    """(prompts, continuations) in tokens: of both together, what the prompt alone leaves."""
    encode = lm.tokenizer.encode
    return [[BOS, *encode(p)] for p, _ in pairs], [
        encode(p + t)[len(encode(p)) :] for p, t in pairs
    ]


def test_choices_share_one_reading_of_their_prompt(lm, monkeypatch):
    read, score_tails = [], scoring.score_tails

    def watch(params, text, length, *rest, **options):
        read.append(int((np.asarray(length) > 0).sum()))
        return score_tails(params, text, length, *rest, **options)

    monkeypatch.setattr(scoring, "score_tails", watch)
    found = {
        a: harness.Adapter(lm, a).loglikelihood(instances("loglikelihood", *PAIRS))
        for a in (False, True)
    }
    assert read == [2, 2]
    for augment, answers in found.items():
        sums, greedy = lm.logprobs(*split(lm, PAIRS), augment)
        assert answers == list(zip(sums.tolist(), greedy.tolist()))
    assert np.abs(np.array(found[True]) - np.array(found[False]))[:, 0].min() > 1e-3


def test_pause_tokens(lm):
    """They have a row in METHODS, and nothing here knows them: they are latents."""
    tokens = {"soft_tokens": np.asarray(lm.coprocessor.params["soft_tokens"])}
    paused = small.with_method(lm.coprocessor, name="pause_tokens")
    paused = dataclasses.replace(paused, params=tokens)
    found = harness.Adapter(ld.AugmentedLM(lm.decoder, paused)).loglikelihood(
        instances("loglikelihood", *PAIRS)
    )
    for augment in (False, True):
        assert (
            np.abs(np.array(found)[:, 0] - lm.logprobs(*split(lm, PAIRS), augment)[0]).min() > 1e-3
        )


def test_a_text_that_is_read(lm):
    """Longer than max_length, too."""
    texts = ["rain fell over green hills", "the cat sat on a mat and a dog ran to the door " * 6]
    assert len(lm.tokenizer.encode(texts[1])) > lm.max_length
    found = {}
    for augment, every in ((False, 0), (True, 0), (True, 16)):
        adapter = harness.Adapter(lm, augment, every)
        found[augment, every] = adapter.loglikelihood_rolling(
            instances("loglikelihood_rolling", *[(t,) for t in texts])
        )
        assert found[augment, every] == lm.rolling_logprobs(texts, augment, every).tolist()
    # the other is over before latents join again
    assert len({round(x[1], 3) for x in found.values()}) == 3


def test_generation(lm):
    """Stop strings, several kinds of request in one call, and their order."""
    prompts = ["the cat sat", "rain", "green hills at night"]
    (free,) = lm.generate(prompts[:1], 12, augment=False)
    stop = free[3:5]
    options = [
        {"until": [stop], "max_gen_toks": 12, "do_sample": False},
        {"until": ["\n\n\n"], "max_gen_toks": 5},
        {"until": [stop, ""], "max_gen_toks": 12, "do_sample": False, "top_p": 0.9},
    ]
    adapter = harness.Adapter(lm, False)
    found = adapter.generate_until(instances("generate_until", *zip(prompts, options)))
    assert found[0] == free[: free.index(stop)] and stop not in found[2]
    assert found[1] == lm.generate(prompts[1:2], 5, augment=False)[0]
    later = harness.Adapter(lm, True, every=3, delay=2).generate_until(
        instances("generate_until", *[(p, options[1]) for p in prompts])
    )
    assert later == lm.generate(prompts, 5, every=3, delay=2) != lm.generate(prompts, 5)
    drawn = instances(
        "generate_until", ("rain", {"until": [], "do_sample": True, "max_gen_toks": 12, "top_k": 9})
    )
    assert adapter.generate_until(drawn) == lm.generate(
        ["rain"], 12, temperature=1.0, top_k=9, seed=[0], augment=False
    )
    with pytest.raises(ld.UserError, match="num_beams"):
        adapter.generate_until(
            instances("generate_until", ("rain", {"until": ["\n"], "num_beams": 4}))
        )


# The table of the published suite, on documents of the form that each task's data have.

NOBODY = {"number": "", "spans": ["a zebra"], "date": {"day": "", "month": "", "year": ""}}
CHOSEN = {"choices": ["A", "B", "C", "D"], "answer": 1}
DOCUMENTS = {  # by the last part of the data's name
    "mmlu": {"question": "Zebra?", "subject": "zebras", **CHOSEN},
    "gsm8k": {"question": "Zebra?", "answer": "So 7.\n#### 7"},
    "drop": {
        "query_id": "1",
        "passage": "Zebra.",
        "question": "Who?",
        "answer": NOBODY,
        "validated_answers": {key: [value] for key, value in NOBODY.items()},
    },
    "ai2_arc": {
        "question": "Zebra?",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "hendrycks_math": {
        "problem": "Zebra?",
        "solution": "It is $\\boxed{7}$.",
        "level": "1",
        "type": "zebras",
    },
    "winogrande": {
        "sentence": "A zebra saw a horse as _ ran.",
        "option1": "zebra",
        "option2": "horse",
        "answer": "1",
    },
    "piqa": {"goal": "Zebra?", "sol1": "a", "sol2": "b", "label": 1},
    "siqa": {
        "context": "Zebra.",
        "question": "Why?",
        "answerA": "a",
        "answerB": "b",
        "answerC": "c",
        "label": "1",
    },
    "hellaswag": {
        "ctx_a": "Zebra.",
        "ctx_b": "It",
        "activity_label": "Run",
        "endings": ["a", "b"],
        "label": "1",
    },
    "super_glue": {"passage": "Zebra.", "question": "is it", "label": 1},
    "mbpp": {"task_id": 1, "text": "Zebra.", "code": "x = 1", "test_list": ["assert x"] * 3},
    "openai_humaneval": {"prompt": "def f():\n", "test": "assert f", "entry_point": "f"},
    "agieval-math": {"query": "Zebra?", "answer": "7"},
    "agieval": {"query": "Zebra?", "choices": ["a", "b"], "gold": [1]},
    "bbh": {"input": "Zebra?", "target": "7"},
    "trivia_qa": {"question": "Zebra", "answer": {"aliases": ["a", "b"], "value": "a"}},
    "nq_open": {"question": "zebra", "answer": ["a", "b"]},
}
# What stands in a prompt as often as it has questions: the worked examples and the one that is
# asked.
MARKS = {
    **dict.fromkeys(("mmlu", "arc_easy", "arc_challenge", "piqa", "boolq", "triviaqa"), "Answer:"),
    **dict.fromkeys(("gsm8k", "bbh", "siqa", "nq"), "Q: "),
    **dict.fromkeys(("drop", "agieval"), "Zebra"),
    **{
        "math": "Problem:",
        "hellaswag": "Run:",
        "mbpp": "[BEGIN]",
        "humaneval": "def f()",
        "winogrande": "zebra saw",
    },
}


@pytest.fixture
def made_up(monkeypatch):
    """The published tasks' data as they would come; code that a model writes does not run."""

    def load_dataset(path, name=None, **_):
        name = path.split("/")[-1]
        row = DOCUMENTS.get(name) or DOCUMENTS[name.split("-")[0].replace("agieval_", "agieval")]
        rows = datasets.Dataset.from_list([row | {"n": str(n)} for n in range(12)])
        return datasets.DatasetDict(
            {split: rows for split in ("train", "validation", "dev", "test")}
        )

    class Metric:
        def compute(self, references, predictions, k):
            return {"pass@1": 1.0}, {}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(evaluate, "load", lambda name: Metric())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


FAST = {"gsm8k": "gsm8k", "arc_easy": "arc", "agieval": "agieval", "humaneval": "humaneval"}


def rows_of_the_paper():
    """All published rows, of which all but one of each kind are slow."""
    return [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in TABLE["PUBLISHED"]
    ]


@pytest.fixture
def public_tasks(request, monkeypatch):
    """Shortens the harness's list of tasks, unless a test is slow: all of it takes 16 s."""
    if request.node.get_closest_marker("slow"):
        return
    harness_folder = Path(lm_eval_tasks.__file__).parent
    folders = [str(harness_folder / name) for name in FAST.values()]
    few = lm_eval_tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(harness_tasks, "_public_tasks", lambda: few)


@pytest.mark.usefixtures("public_tasks")
@pytest.mark.parametrize("name", rows_of_the_paper())
def test_published_row(says, made_up, name):
    row = TABLE["PUBLISHED"][name]
    loaded = harness_tasks.load_public_task(row.get("task", name))
    adapter = harness.Adapter(says, False)
    samples = harness.run_tasks(adapter, loaded, row["shots"], 2, unsafe_code=True)
    counted = [s for s in samples if s["filter"] == row.get("filter", "none")]
    assert {s["task"] for s in counted} == set(loaded["tasks"])
    assert scores.summarize_scores(counted, row["metric"], name)["documents"] == 2 * len(
        loaded["tasks"]
    )
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count(MARKS[name]) == row["shots"] + 1, prompt
        if sample["task"] == "agieval_aqua_rat":
            assert prompt.count("Zebra? b\n\n") == 3, prompt


def test_no_worked_example_is_the_asked_question(says, tmp_path):
    """A task with a test split alone shows other documents of it."""
    rows = [{"question": f"Number {n}?", "choices": ["a", "b"], "gold": 0} for n in range(6)]
    make_tasks.write_task(tmp_path, "syllogism", {"test": rows})
    loaded = harness_tasks.load_local_task("syllogism", str(tmp_path))
    for sample in harness.run_tasks(harness.Adapter(says, False), loaded, 4):
        prompt = sample["arguments"][0][0]
        assert prompt.count("Number ") == 5
        assert prompt.count(sample["doc"]["question"]) == 1


def test_a_task_of_dates_has_text(tmp_path):
    """`datasets` would make times of them, if it read the file."""
    rows = {"test": [{"question": "When?", "answer": "2020-01-02"}]}
    make_tasks.write_task(tmp_path, "chain_sum", rows)
    loaded = harness_tasks.load_local_task("chain_sum", str(tmp_path))["tasks"]["chain_sum"]
    (doc,) = loaded.eval_docs
    assert doc == rows["test"][0]


def test_a_data_file_of_another_name_is_refused(tmp_path):
    """`benchmark` would not see that its questions changed."""
    make_tasks.write_task(tmp_path, "syllogism", {"test": [{"question": "?"}]})
    path = tmp_path / "syllogism.yaml"
    path.write_text(path.read_text().replace("syllogism.test.jsonl", "mine.jsonl"))
    with pytest.raises(ld.UserError, match="data file 'mine.jsonl': expected syllogism.test.jsonl"):
        harness_tasks.load_local_task("syllogism", str(tmp_path))


def test_published_rows_are_the_papers():
    assert list(TABLE["PUBLISHED"]) == list(published.BENCHMARKS)
    for name, row in TABLE["PUBLISHED"].items():
        setting = published.BENCHMARKS[name].setting
        if shots := re.match(r"(\d)-", setting):
            assert int(shots[1]) == row["shots"], name
    assert set(TABLE["OFFLINE"]) == set(make_tasks.TASKS)


# Figures.


def test_intervals():
    """Wilson's interval is where the score test has p = 0.05; the error is a jackknife's."""
    samples = [{"acc": float(n < 13), "metrics": ["acc"]} for n in range(40)]
    made, p, n = scores.summarize_scores(samples, "acc"), 13 / 40, 40

    def edge(low, high):
        return 100 * optimize.brentq(lambda q: (p - q) ** 2 - 1.96**2 * q * (1 - q) / n, low, high)

    assert (made["value"], made["unit"], made["documents"]) == (pytest.approx(32.5), "percent", 40)
    assert (made["low"], made["high"]) == (
        pytest.approx(edge(1e-9, p)),
        pytest.approx(edge(p, 1 - 1e-9)),
    )
    assert made["stderr"] == pytest.approx(
        100 * np.std([1.0] * 13 + [0.0] * 27, ddof=1) / np.sqrt(40)
    )

    draw = np.random.default_rng(0)
    size = draw.integers(800, 1200, 300)
    logprobs = -size * (0.7 + 0.1 * draw.standard_normal(300))
    made = scores.summarize_scores(
        [{"bits_per_byte": (a, b)} for a, b in zip(logprobs, size)], "bits_per_byte"
    )
    bits = -logprobs / np.log(2)
    left_out = (bits.sum() - bits) / (size.sum() - size)
    jackknife = np.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    assert made["value"] == pytest.approx(bits.sum() / size.sum())
    assert made["stderr"] == pytest.approx(jackknife, rel=0.01)
    half = 1.9679296 * made["stderr"]  # Student's t, 299 degrees of freedom
    assert (made["low"], made["high"]) == pytest.approx(
        (made["value"] - half, made["value"] + half)
    )


@pytest.mark.parametrize("score, low, high", [(0.0, 0.0, 79.35), (1.0, 20.65, 100.0)])
def test_one_document(score, low, high):
    made = scores.summarize_scores([{"acc": score, "metrics": ["acc"]}], "acc")
    assert (made["low"], made["high"]) == (
        pytest.approx(low, abs=0.01),
        pytest.approx(high, abs=0.01),
    )
    assert made["stderr"] is None
    read = scores.summarize_scores([{"bits_per_byte": (-8.0, 4)}], "bits_per_byte")
    assert read["low"] is read["stderr"] is None and "2.89" in scores.format_rows([ROW | read])


def answered(*values):
    return [{"task": "t", "doc_id": i, "acc": value} for i, value in enumerate(values)]


@pytest.mark.parametrize("only_ours, only_theirs, both, neither", [(9, 2, 20, 9), (0, 0, 30, 10)])
def test_two_models_are_compared_document_by_document(only_ours, only_theirs, both, neither):
    """With Agresti's and Min's interval: the usual one, with half a document more in each cell."""
    ours = answered(*[1.0] * only_ours, *[0.0] * only_theirs, *[1.0] * both, *[0.0] * neither)
    theirs = answered(*[0.0] * only_ours, *[1.0] * only_theirs, *[1.0] * both, *[0.0] * neither)
    made = scores.compare_scores(ours, theirs[::-1], "acc")
    b, c, n = only_ours + 0.5, only_theirs + 0.5, len(ours) + 2
    half = 1.96 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    assert made == {
        "change": pytest.approx(100 * (only_ours - only_theirs) / len(ours)),
        "change_low": pytest.approx(100 * ((b - c) / n - half)),
        "change_high": pytest.approx(100 * ((b - c) / n + half)),
    }
    apart = [
        scores.summarize_scores([s | {"metrics": ["acc"]} for s in x], "acc")
        for x in (ours, theirs)
    ]
    width = np.hypot(*(each["high"] - each["low"] for each in apart))
    assert made["change_high"] - made["change_low"] < width  # of intervals that ignore the pairs


def test_bits_per_byte_are_compared_text_by_text():
    draw = np.random.default_rng(1)
    size = draw.integers(800, 1200, 50)
    theirs = -size * (0.7 + 0.1 * draw.standard_normal(50))
    ours = theirs + size * (0.01 + 0.001 * draw.standard_normal(50))
    samples = [
        [
            {"task": "t", "doc_id": i, "bits_per_byte": [x, n]}
            for i, (x, n) in enumerate(zip(logp, size))
        ]
        for logp in (ours, theirs)
    ]
    made = scores.compare_scores(*samples, "bits_per_byte")
    values = [scores.summarize_scores(each, "bits_per_byte")["value"] for each in samples]
    assert made["change"] == pytest.approx(values[0] - values[1])
    assert made["change_low"] < made["change"] < made["change_high"] < 0
    assert made["change_high"] - made["change_low"] < 0.002


ROW = {"benchmark": "b", "model": "decoder", "shots": 0, "every": 0, "delay": 0}


# The command.


@pytest.fixture
def call(trained, tasks, tmp_path, capsys):
    """call(benchmarks, model, ...) -> the error; or benchmarks.json, and what was measured."""

    def run(benchmarks, model="decoder", **flags):
        flags = {"workdir": trained, "tasks": tasks, "batch_size": 4} | flags
        capsys.readouterr()
        error = run_command(
            "benchmark", benchmarks=benchmarks, model=model, out=tmp_path / "out", **flags
        )
        if error:
            return error
        written = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
        table = scores.format_rows(written["rows"]) + "\n"
        said = capsys.readouterr().out
        assert said.endswith(table)
        return written, re.findall(r"^\w+, \w+$", said, re.MULTILINE)

    return run


def test_rows_and_resume(call, tmp_path):
    """Latents are in the rows that name them; no row is made twice; samples stand beside."""
    first, measured = call("syllogism")
    assert measured == ["syllogism, decoder"]
    found, measured = call(
        "syllogism, chain_sum,held_out_text", "decoder,augmented", every=4, delay=2
    )
    assert measured == [
        "syllogism, augmented",
        "chain_sum, decoder",
        "chain_sum, augmented",
        "held_out_text, decoder",
        "held_out_text, augmented",
    ]
    assert found["rows"][0] == first["rows"][0]
    values = {(row["benchmark"], row["model"]): row["value"] for row in found["rows"]}
    for row in found["rows"]:
        change = row["value"] - values[row["benchmark"], "decoder"]
        compared = row["model"] == "augmented"
        assert row.get("change") == (pytest.approx(change, abs=1e-9) if compared else None)
        assert not compared or row["change_low"] < row["change"] < row["change_high"]
    settings = [(row["every"], row["delay"], row["shots"], row["cot"]) for row in found["rows"]]
    assert settings == [
        (0, 0, 4, ""),
        (0, 0, 4, ""),
        (0, 0, 4, ""),
        (4, 2, 4, ""),
        (0, 0, 0, ""),
        (4, 0, 0, ""),
    ]
    assert found["step"] == 4 and found["config"]["method"]["num_latents"] == 2
    assert found["architecture"]["embed_dim"] > 0 and found["assistant"] == {}
    assert all(row["provenance"]["versions"]["lm_eval"] for row in found["rows"])
    assert call("chain_sum,syllogism", "decoder,augmented", every=4, delay=2) == (found, [])
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == [
        "chain_sum.augmented.every4.delay2.jsonl",
        "chain_sum.decoder.jsonl",
        "held_out_text.augmented.every4.jsonl",
        "held_out_text.decoder.jsonl",
        "syllogism.augmented.jsonl",
        "syllogism.decoder.jsonl",
    ]


def test_keys_are_not_late(call, monkeypatch):
    """It is said before anything is loaded."""
    row = METHODS["cache_augmentation"]._replace(writes_keys=True)
    monkeypatch.setitem(METHODS, "cache_augmentation", row)
    monkeypatch.setattr(benchmark, "_load_tasks", None)
    said = call("syllogism", "augmented", delay=1)
    assert "delay=1: method 'cache_augmentation' writes keys" in said


def test_questions_of_your_own(call, lm, tmp_path, monkeypatch):
    """Right in full or wrong, whatever spaces; of a reply with steps what follows them counts.

    They are asked as `Question.prompt` says.
    """
    rows = [
        {"question": "the cat", "answer": "7"},
        {"question": "the dog", "answer": " a  hill", "steps": ["it ran"]},
        {"question": "rain", "answer": "7", "steps": ["it", "fell"]},
        {"question": "hills", "answer": " [14,54]"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    asked = []

    def generate(self, prompts, new, stop, **_):
        asked.append(([self.tokenizer.decode(prompt[1:]) for prompt in prompts], new, stop))
        return [" 7 ", " it ran #### a hill", " it fell #### 8", " [14,54]"]

    monkeypatch.setattr(Question, "prompt", lambda self: f"{self.question}?")
    monkeypatch.setattr(type(lm), "generate", generate)
    found, _ = call(f"qa:{file}")
    (row,) = found["rows"]
    assert (row["benchmark"], row["documents"]) == ("mine", 4)
    assert row["value"] == 75
    samples = (tmp_path / "out" / "samples" / "mine.decoder.jsonl").read_text().splitlines()
    assert [json.loads(line)["target"] for line in samples] == ["7", "a hill", "7", "[14,54]"]
    longest = len(" it fell #### 7\n")
    prompts = ["the cat?", "the dog?", "rain?", "hills?"]
    assert asked == [(prompts, max(longest, len(" it ran #### a hill\n")), ["\n"])]
    dates = [{"question": word, "answer": "2020-01-02"} for word in ("the cat", "rain")]
    file.write_text("".join(json.dumps(row) + "\n" for row in dates))
    loaded = harness_tasks.load_questions(str(file))["tasks"]["mine"]
    assert [loaded.doc_to_target(doc) for doc in loaded.eval_docs] == ["2020-01-02"] * 2
    file.write_text('{"question": "the cat"}\n')
    assert re.search(r"mine.jsonl: line 1: 'answer' is None", call(f"qa:{file}"))
    file.write_text(json.dumps({"question": "a", "answer": "\ud800"}) + "\n")
    assert "mine.jsonl: the task cannot be loaded (" in call(f"qa:{file}")
    file.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    assert "--model=zero_shot_cot: mine has" in call(f"qa:{file}", "zero_shot_cot")


@pytest.fixture
def questions_file(tmp_path, monkeypatch):
    """A file of three questions, their prompts and right replies. Nothing is generated."""
    monkeypatch.setattr(ld.AugmentedLM, "generate", lambda self, asked, *_, **__: [""] * len(asked))
    rows = [
        {"question": "the cat sat", "answer": " on  a mat", "steps": ["it ran"]},
        {"question": "rain fell", "answer": "over hills"},
        {"question": "night", "answer": "7"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    prompts = [f"{row['question']}\nAnswer:" for row in rows]
    return file, prompts, [" on a mat\n", " over hills\n", " 7\n"]


def test_log_p_of_the_answers(call, questions_file, trained_lm, tmp_path):
    """By `logprobs`, for each document and over all; kept on resume; without --every or --delay."""
    file, prompts, replies = questions_file
    found, _ = call(f"qa:{file}", "decoder,augmented")
    means = []
    for row, augment in zip(found["rows"], (False, True)):
        expected = trained_lm.logprobs(prompts, replies, augment, batch_size=4)[0]
        file_of_samples = tmp_path / "out" / "samples" / f"mine.{row['model']}.jsonl"
        samples = [json.loads(line) for line in file_of_samples.read_text().splitlines()]
        assert [sample["answer_logp"] for sample in samples] == pytest.approx(expected, rel=1e-5)
        half = (
            4.3026527 * np.std(expected, ddof=1) / np.sqrt(3)
        )  # Student's t, 2 degrees of freedom
        figures = [row[f"answer_logp{end}"] for end in ("", "_low", "_high")]
        assert figures == pytest.approx(expected.mean() + np.array([0, -half, half]), rel=1e-5)
        means.append(row["answer_logp"])
    assert abs(means[0] - means[1]) > 1e-6
    for rhythm in ({"every": 2}, {"delay": 1}):
        again, measured = call(f"qa:{file}", "decoder,augmented", **rhythm)
        assert again["rows"][:2] == found["rows"] and measured == ["mine, augmented"]
        assert "answer_logp" not in again["rows"][-1]
    table = scores.format_rows(again["rows"]).splitlines()
    assert table[0].endswith("  log p of answer  95 % interval, nats")
    assert f"  {means[0]:.3f}  " in table[1] and table[3].endswith("]")


def test_older_rows_of_questions(call, questions_file, tmp_path):
    """They count as made, and stand in the table beside rows that have log p of the answers."""
    written, _ = call(f"qa:{questions_file[0]}", limit=1)
    (row,) = written["rows"]
    assert "answer_logp_low" not in row  # one document has no interval
    older = {key: row[key] for key in row if key != "answer_logp"}
    file = tmp_path / "out" / "benchmarks.json"
    file.write_text(json.dumps(written | {"rows": [older]}))
    found, measured = call(f"qa:{questions_file[0]}", limit=1)
    assert (found["rows"], measured) == ([older], [])
    assert "log p" not in scores.format_rows([older])
    assert len(scores.format_rows([older, row]).splitlines()) == 3


def test_answers_are_scored_after_the_prompt_as_it_is_asked(says, tmp_path):
    """A prompt that is too long is cut as for the generation; an answer has to fit."""
    file, answers = tmp_path / "long.jsonl", ("on a mat", "over hills")
    rows = [{"question": "the cat sat on a mat " * 20, "answer": answer} for answer in answers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    says.max_length = 40
    loaded, adapter = harness_tasks.load_questions(str(file)), harness.Adapter(says)
    assert adapter.answer_logprobs(loaded, limit=1) == [0] and len(says.prompts) == 1
    assert adapter.answer_logprobs(loaded) == [0, -1]
    assert says.tails == [says.tokenizer.encode_in_text(f" {answer}\n") for answer in answers]
    scored = says.prompts
    harness.run_tasks(adapter, loaded, 0)
    assert says.prompts == scored and len(scored[0]) < 40
    says.max_length = 1 + len(says.tails[0])
    with pytest.raises(ld.UserError, match="document 0 of long has an answer of . tokens"):
        adapter.answer_logprobs(loaded)


def test_names_of_files_of_questions():
    for name, row in (("qa:test.jsonl", "test"), ("qa:x/countdown.test.jsonl", "countdown.test")):
        assert list(suites.choose(TABLE, name)) == [row]


def test_a_rhythm_of_its_own(call, monkeypatch):
    """Refused before the decoder's row is made."""
    read = load.read_record

    def recurring(*args):
        found = read(*args)
        method = found.config["method"] | {"every": 4}
        return dataclasses.replace(found, config=found.config | {"method": method})

    monkeypatch.setattr(load, "read_record", recurring)
    assert "every=2: latents join again after every 4" in call("chain_sum", every=2)
    assert "delay=4: expected less than every=4" in call("chain_sum", delay=4)


@pytest.mark.slow
def test_a_quick_look_gives_way_to_more_documents(call):
    call("chain_sum", "zero_shot_cot", limit=1)
    found, measured = call("chain_sum", "zero_shot_cot", limit=2, attention="reference")
    (row,) = found["rows"]
    assert measured == ["chain_sum, zero_shot_cot"] and row["documents"] == 2
    assert row["shots"] == 0 and row["cot"] == TABLE["COT"]


@pytest.mark.slow
def test_samples_are_what_the_model_says(call, trained_lm, tmp_path):
    call("syllogism", "decoder,augmented")
    shown = [
        f"Question: {r['question']}\nAnswer: {r['choices'][r['gold']]}"
        for r in ROWS["syllogism"]["train"]
    ]
    asked = [f"Question: {r['question']}\nAnswer:" for r in ROWS["syllogism"]["test"][:2]]
    prompts = ["\n\n".join([*shown, question]) for question in asked]
    pairs = [(prompt, answer) for prompt in prompts for answer in (" Yes", " No")]
    answers = split(trained_lm, pairs)
    for model in ("decoder", "augmented"):
        lines = (
            (tmp_path / "out" / "samples" / f"syllogism.{model}.jsonl").read_text().splitlines()[:2]
        )
        expected = trained_lm.logprobs(*answers, augment=model == "augmented", batch_size=4)[0]
        found = [float(r[0][0]) for line in lines for r in json.loads(line)["resps"]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_row_is_made_as_it_says(call, monkeypatch):
    """Rhythm and words of a row are those of the model that is asked."""
    made, adapter = [], harness.Adapter

    def watched(*args):
        made.append((*args[1:4], *args[5:]))
        return adapter(*args)

    monkeypatch.setattr(harness, "Adapter", watched)
    call("chain_sum", "augmented", every=4, delay=2)
    call("chain_sum", "zero_shot_cot")
    assert made == [(True, 4, 2, ""), (False, 0, 0, TABLE["COT"])]


def test_rows_made_in_another_way_are_refused(call, tmp_path):
    """Other settings, problems or words; another checkpoint, decoder or training."""
    other, table = tmp_path / "other", tmp_path / "table.py"
    other.mkdir()
    make_tasks.write_task(
        other, "syllogism", ROWS["syllogism"] | {"test": ROWS["syllogism"]["test"][:3]}
    )
    table.write_text(
        (ROOT / "configs" / "benchmarks.py").read_text().replace("COT = ", "COT = 'Well. ' + ")
    )
    written, _ = call("syllogism")
    call("chain_sum", "zero_shot_cot", limit=2)
    assert "another limit" in call("syllogism", limit=2)
    assert "another max_length" in call("syllogism", max_length=64)
    assert "another data" in call("syllogism", tasks=other)
    assert "another cot" in call("chain_sum", "zero_shot_cot", limit=2, table=table)
    # A row of fewer documents gives way to one of more, but not to one of other settings.
    assert "another cot" in call("chain_sum", "zero_shot_cot", table=table)
    assert "another step (4, here 2)" in call("syllogism", step=2)
    assert "another config" in call("syllogism", workdir="", decoder="packaged")
    assert "chain_sum has answers of up to 16 tokens" in call("chain_sum", max_length=17)
    assert "--max_length=1: expected at least 2" in call("syllogism", max_length=1)
    file = tmp_path / "out" / "benchmarks.json"
    later = ("architecture", "assistant")  # fields that older files lack
    file.write_text(json.dumps({key: written[key] for key in written if key not in later}))
    assert call("syllogism")[1] == []
    file.write_text(json.dumps(written | {"fingerprint": "0"}))
    assert "another fingerprint (0, here " in call("syllogism")
    file.write_text('{"rows": 3}')
    assert "benchmarks.json: not written by `benchmark`" in call("syllogism")


def test_a_row_that_another_call_makes_meanwhile(call, monkeypatch):
    run = harness.run_tasks

    def meanwhile(*args):
        monkeypatch.setattr(harness, "run_tasks", run)
        call("chain_sum")
        return run(*args)

    monkeypatch.setattr(harness, "run_tasks", meanwhile)
    found, _ = call("syllogism")
    assert [row["benchmark"] for row in found["rows"]] == ["chain_sum", "syllogism"]


@pytest.mark.parametrize(
    "name, text, file",
    [
        ("syllogism", "{", "syllogism.test.jsonl"),
        ("chain_sum", None, "chain_sum.test.jsonl"),  # no such file
        (
            "syllogism",
            '{"question": "a", "choices": ["b", "c"], "gold": "no number"}',
            "syllogism.yaml",
        ),
        ("chain_sum", '{"answer": "3", "text": "a"}', "chain_sum.test.jsonl"),
        ("syllogism", "[]", "syllogism.test.jsonl: line 2"),
        (
            "syllogism",
            '{"question": "a", "choices": ["b"], "gold": 1}',
            "syllogism.test.jsonl: line 2",
        ),
        (
            "syllogism",
            '{"question": "a", "choices": ["b"], "gold": null}',
            "syllogism.test.jsonl: line 2",
        ),
        (
            "syllogism",
            '{"question": "a", "choices": [], "gold": 0}',
            "syllogism.test.jsonl: line 2",
        ),
        ("held_out_text", "", "held_out_text.test.jsonl"),  # an empty file
    ],
)
def test_a_damaged_task_is_named(call, tmp_path, name, text, file):
    make_tasks.write_task(tmp_path, name, ROWS[name])
    path = tmp_path / f"{name}.test.jsonl"
    if text is None:
        path.unlink()
    else:
        first = path.read_text().splitlines()[0]
        path.write_text(f"{first}\n{text}\n" if text else "")
    assert call(name, tasks=tmp_path).startswith(f"error: {tmp_path / file}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row, words",
    [
        ({"metric": "acc"}, "syllogism lacks shots"),
        (
            {"shots": 0, "metric": "accuracy"},
            "syllogism: metric='accuracy', the task has ['acc'",
        ),
        (
            {"shots": 0, "metric": "acc", "filter": "strict"},
            "syllogism: filter='strict', the task has ['none']",
        ),
        ({"shots": 5, "metric": "acc"}, "syllogism: shots=5, the task has 4 to show"),
    ],
)
def test_a_table_asks_of_a_task_what_it_has(call, tmp_path, row, words):
    table = tmp_path / "table.py"
    table.write_text(f"PUBLISHED, COT, OFFLINE = {{}}, '', {{'syllogism': {row}}}")
    assert f"--table={table}: {words}" in call("syllogism", table=table)


def test_the_asked_document_is_not_among_those_to_show(call, tmp_path):
    """Without a split to train on, documents that are asked are shown."""
    make_tasks.write_task(tmp_path, "syllogism", {"test": ROWS["syllogism"]["test"]})
    table = tmp_path / "table.py"
    row = {"shots": 4, "metric": "acc"}
    table.write_text(f"PUBLISHED, COT, OFFLINE = {{}}, '', {{'syllogism': {row}}}")
    line = call("syllogism", table=table, tasks=tmp_path)
    assert "syllogism: shots=4, the task has 3 to show" in line


MISTAKES = {
    "unknown": (
        dict(benchmarks="gsm9k"),
        "--benchmarks=gsm9k: no such benchmark; there are published, offline, mmlu",
    ),
    "empty": (dict(benchmarks=" ,"), "--benchmarks is empty"),
    "model": (dict(model="decoder,best"), "--model=decoder,best"),
    "no model": (dict(model=","), "--model=,"),
    "table": (dict(table="none.py"), "--table=none.py"),
    "no table": (dict(table=f"{ROOT}/README.md"), "README.md: SyntaxError"),
    "another table": (dict(table="configs/quickstart.py"), "lacks COT, OFFLINE, PUBLISHED"),
    "tasks": (
        dict(tasks="nowhere"),
        "nowhere/syllogism.yaml: no such file; tools.make_tasks makes",
    ),
    "delay": (dict(every=2, delay=2), "delay=2"),
    "batch": (dict(batch_size=0), "--batch_size=0"),
    "limit": (dict(limit=0), "--limit=0"),
    "attention": (dict(attention="flash"), "attention='flash'"),
    "code": (dict(benchmarks="published"), "--confirm_run_unsafe_code"),
    "decoder": (dict(decoder="nowhere"), "decoder 'nowhere'"),
    "step": (dict(decoder="packaged", step=3), "--step=3"),
    "neither": (dict(decoder=""), "--workdir"),
    "both": (dict(workdir="w"), "w: holds no checkpoints"),
    "workdir": (dict(decoder="", workdir="nowhere"), "nowhere: holds no checkpoints"),
    "latents": (dict(model="augmented"), "--model=augmented"),
    "cot": (dict(model="zero_shot_cot"), "--model=zero_shot_cot: syllogism"),
    "unused every": (dict(every=2), "--every=2: no selected benchmark uses it"),
    "unused delay": (
        dict(decoder="", workdir="trained", model="augmented", delay=2),
        "--delay=2: no selected benchmark uses it",
    ),
    "questions of a known name": (dict(benchmarks="qa:x/gsm8k.jsonl"), "rename the file"),
    "questions of one name": (dict(benchmarks="qa:a/t.jsonl,qa:b/t.jsonl"), "rename the file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_flags_write_nothing(call, decoder_folder, trained, tmp_path, name):
    """Each is told in one line."""
    changes, words = MISTAKES[name]
    if changes.get("workdir") == "trained":
        changes = changes | {"workdir": trained}
    line = call(**{"benchmarks": "syllogism", "workdir": "", "decoder": decoder_folder} | changes)
    assert line.startswith("error: ") and words in line and "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("public_tasks")
def test_a_task_that_the_harness_does_not_have():
    with pytest.raises(ld.UserError, match="arc_hard"):
        harness_tasks.load_public_task("arc_hard")


def test_a_metric_that_a_task_does_not_have():
    with pytest.raises(ld.UserError, match="arc: .*'f1'"):
        scores.summarize_scores([{"acc": 1.0, "metrics": ["acc"]}], "f1", "arc")
    for value in ((-40.0, 9), -2.5):  # of word_perplexity, and of perplexity
        with pytest.raises(ld.UserError, match=r"arc: metric 'ppl' is .*, expected a score from 0"):
            scores.summarize_scores([{"ppl": value, "metrics": ["ppl"]}], "ppl", "arc")


@pytest.mark.usefixtures("public_tasks")
def test_without_the_network(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\n'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ld.UserError, match="arc_easy: .*Couldn't reach 'allenai.* HF_HUB_OFFLINE=1"
    ):
        harness_tasks.load_public_task("arc_easy")
