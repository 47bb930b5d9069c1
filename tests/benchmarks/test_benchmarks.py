"""Every benchmark runs in its smallest form, and writes what it measured on what."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, common, decoding, evaluation, overlap, parts, step
from latent_delib.nn.attention.primitive import Bounds

TRACES = "--seq_len 48 --traces 4 --ahead 3 --latents 2".split()
EVERY = {
    "benchmark",
    "command",
    "date",
    "device",
    "cores",
    "python",
    "jax",
    "xla_flags",
    "settings",
    "rows",
}
TIMES = {"latents", "batch", "form", "ms", "ms_min", "ms_max"}
FORMS = {
    attention: (["dense", "xla"], TRACES, TIMES | {"pass", "tflops", "vs_dense", "temp_gib"}),
    step: (
        ["dense", "xla"],
        TRACES,
        TIMES | {"remat", "tflops", "mfu", "vs_dense", "vs_torch", "needs_gib"},
    ),
    evaluation: (
        ["xla, reused", "xla, again"],
        "--seq_len 48 --positions 24 --ahead 3 --latents 2".split(),
        TIMES | {"tokens_per_second", "vs_again"},
    ),
    decoding: (
        ["plain", "latents"],
        "--seq_len 8 --new 4 --latents 2 --batch 2".split(),
        TIMES | {"tokens_per_second", "bandwidth_share"},
    ),
    overlap: (
        ["plain", "waits", "beside"],
        "--seq_len 8 --new 40 --latents 2".split(),
        {"form", "ms", "ms_min", "ms_max"},
    ),
}


@pytest.mark.parametrize(
    "benchmark",
    [
        pytest.param(m, marks=[pytest.mark.slow] * (m in (overlap, decoding, step)), id=m.__name__)
        for m in FORMS
    ],
)
def test_smallest_form(benchmark, tmp_path, capsys):
    forms, arguments, columns = FORMS[benchmark]
    common_arguments = [
        "--size",
        "gemma2_test",
        "--rounds",
        "1",
        "--least",
        "0",
        f"--json={tmp_path}/table.json",
    ]
    benchmark.main([*arguments, *common_arguments, "--forms", *forms])
    found = json.loads((tmp_path / "table.json").read_text())
    assert EVERY <= set(found) and found["settings"]["size"] == "gemma2_test"
    assert {row["form"] for row in found["rows"]} == set(forms)
    assert all(columns <= set(row) for row in found["rows"])
    printed = capsys.readouterr().out
    assert found["device"] in printed and found["date"] in printed and found["command"] in printed
    assert all(line in printed for line in common.table(found["rows"]).splitlines())


@pytest.mark.slow
def test_parts_of_a_step(tmp_path):
    parts.main(
        [
            *TRACES,
            "--size",
            "gemma2_test",
            "--rounds",
            "1",
            "--least",
            "0",
            f"--json={tmp_path}/table.json",
        ]
    )
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["part"] for row in rows][::5] == ["text", "+ optimizer"] and len(rows) == 6
    np.testing.assert_allclose(sum(row["added_ms"] for row in rows), rows[-1]["ms"])


def test_useful_flops_of_attention_count_visible_pairs():
    """Two traces of 2 tokens over 3 and 5 of text: 2 x 8 pairs with it, 2 x 3 of their own."""
    config, ones = common.ARCHITECTURES["gemma2_test"], np.ones((1, 2, 2), int)
    bounds = Bounds(jnp.array(0 * ones), jnp.array([[[3, 3], [5, 5]]]), jnp.array(0 * ones))
    # FLOPs of one of a pair's products, over all heads
    product = 2 * config.num_heads * config.head_dim
    assert common.attention_flops(config, bounds, backward=False) == 2 * product * (16 + 6)
    assert common.attention_flops(config, bounds, backward=True) == product * (4 * 16 + 6 * 6)


def test_forms_that_do_not_fit_have_no_times():
    def too_large():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    found = common.measure(
        {"fits": common.calls(lambda: 0), "large": common.calls(too_large)}, rounds=2
    )
    assert len(found["fits"]) == 2 and common.spread(found["large"])["ms"] is None
