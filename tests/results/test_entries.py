"""Which files are of one model, and which are not."""

from latent_delib.results import entries, runs, tables
from tests.results.writers import OURS, benchmarks, config, perplexity, tables_of


def entries_of(folder):
    return entries.entries(runs.find([str(folder)]))


def test_perplexity_and_benchmarks_of_a_checkpoint_are_one_entry(tmp_path):
    """A checkpoint's figures are on two lines, or a decoder trained with it is not on its own."""
    perplexity(tmp_path, -1.0, config("joint"))
    scores = {("gsm8k", "augmented", 0): 50.0, ("gsm8k", "decoder", 0): 40.0}
    benchmarks(tmp_path, scores, config("joint"), fingerprint="trained")
    decoder, joint = entries_of(tmp_path)
    assert entries.label(decoder).startswith("trained decoder, of joint, without its latents")
    assert decoder.perplexity is None and decoder.scores["gsm8k"][0]["value"] == 40.0
    assert [each.path.name for each in joint.results] == ["perplexity.json", "benchmarks.json"]
    assert joint.scores["gsm8k"][0]["value"] == 50.0


def test_a_control_and_another_text_are_entries_of_their_own(tmp_path):
    """A control's figures stand as the checkpoint's own, or two texts are mixed."""
    for name, evaluated, text in (
        ("plain", {}, "same"),
        ("swap", {"swap": True}, "same"),
        ("text", {}, "other"),
    ):
        of = config() | {"evaluate": evaluated, "data": {"validation": [text]}}
        perplexity(tmp_path / name, -1.0, of, run="run")
    found = entries_of(tmp_path)
    assert [(each.result.path.parent.name, entries.label(each)) for each in found] == [
        ("plain", OURS),
        ("swap", f"{OURS}, latents of another text"),
        ("text", OURS),
    ]


def test_every_evaluation_is_there(tmp_path):
    """The same figures stand twice, or others of the checkpoint are lost."""
    for name, change in (("run", -1.0), ("run/decoder", -1.0), ("run/samples", -2.0)):
        perplexity(tmp_path / name, change, run="run")
    found = []
    for entry in entries_of(tmp_path):
        keys = [result.key for result in entry.results]
        found.append((keys, entry.perplexity["change_percent"]))
    assert found == [(["P1", "P2"], -1.0), (["P3"], -2.0)]


def test_a_trained_decoder_is_not_the_frozen_one(tmp_path):
    """A trained decoder's scores stand as the frozen one's.

    Perplexity names the decoder compared with, benchmarks the one that was trained.
    """
    perplexity(tmp_path / "latents", -1)
    benchmarks(tmp_path / "latents", {("gsm8k", "augmented", 0): 20})
    perplexity(tmp_path / "trained", -5, config("decoder"))
    scores = {("gsm8k", "decoder", 0): 99, ("gsm8k", "zero_shot_cot", 0): 98}
    benchmarks(tmp_path / "trained", scores, config("decoder"), fingerprint="trained")
    by_name = tables_of(tmp_path)
    _, *ours = [row[2:6] for row in by_name["2_benchmarks"] if row[0] == "GSM8K"]
    assert ours == [
        [OURS, "", "", "20.00 [18.00, 22.00] B1"],
        ["trained decoder, step 180, seed 3", "99.00 [97.00, 101.00] B2", "", ""],
    ]
    trained, cot, _ = by_name["0_runs"]
    assert trained[0].startswith("trained decoder") and trained[5] == "-5.00% [-5.25, -4.75]"
    assert cot[0].startswith("zero-shot CoT, trained decoder")


def write_two_runs_of_one_name(folder):
    """Writes two trainings in workdirs of one name, evaluated on other questions of one name."""
    for name, seed, documents in (("a", 1, 10), ("b", 2, 500)):
        of = config() | {"seed": seed}
        perplexity(folder / name / "run", -seed, of)
        values = {("test", "augmented", 0): 10.0 * seed, ("test", "decoder", 0): seed}
        benchmarks(folder / name / "run", values, of, documents=documents)


def test_runs_of_one_name_are_entries_of_their_own(tmp_path):
    """The scores of another training in a workdir of the same name are shown as this one's."""
    write_two_runs_of_one_name(tmp_path)
    scores = {}
    for entry in entries_of(tmp_path):
        key = entry.model, entry.perplexity and entry.perplexity["augmented_ppl"]
        scores.setdefault(key, []).extend(score["value"] for score, _ in entry.scores.values())
    latents = {("augmented", 49.5): [10.0], ("augmented", 49.0): [20.0]}
    assert scores == latents | {("decoder", None): [1, 2]}


def test_other_questions_of_one_name_have_a_line_of_their_own(tmp_path):
    """Scores on different questions stand side by side as if they could be compared."""
    write_two_runs_of_one_name(tmp_path)
    made = tables.tables(runs.find([str(tmp_path)]))
    (table,) = (table for table in made if table.name == "2_benchmarks")
    rows = [dict(zip(table.columns, row)) for row in table.rows if row[0] == "test"]
    lines = [(row["decoder"].value, row["8 latents"].value, row["setting"]) for row in rows]
    assert lines == [
        (1, 10.0, "acc, 4-shot, 10 documents"),
        (2, 20.0, "acc, 4-shot, 500 documents"),
    ]


def test_two_trained_decoders_of_one_name(tmp_path):
    """The scores of two decoders are shown as of one."""
    for name, change in (("a", -1.0), ("b", -2.0)):
        folder = tmp_path / name / "run"
        perplexity(folder, change, config("decoder"))
        scores = {(f"of_{name}", "decoder", 0): 5.0}
        benchmarks(folder, scores, config("decoder"), fingerprint=f"trained {name}")
    each = [set(entry.scores) for entry in entries_of(tmp_path)]
    assert {"of_a", "of_b"} not in each and {"of_a"} in each and {"of_b"} in each
