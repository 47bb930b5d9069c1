"""The table of slices: its rows, its estimates, and what the compiler for TPUs says."""

import dataclasses
import importlib.util
import json

import pytest
from ml_collections import ConfigDict

from benchmarks import scaling
from configs import base
from latent_delib.errors import UserError
from latent_delib.machine.chips import CHIPS, Chip
from latent_delib.nn.sizes import SIZES

GIB = 2.0**30
FOUND = {
    "chip": "TPU v5",
    "flops": {"useful": 3e9, "recomputed": 1e9},
    "received": {
        "all-gather": {"calls": 2, "received": 7e8},
        "all-reduce": {"calls": 1, "received": 3e8},
    },
    "memory": {
        "frozen weights": GIB / 2,
        "trainable weights": GIB / 2,
        "optimizer": GIB,
        "cache of the text": GIB,
        "other temporaries": 2 * GIB,
        "total": 5 * GIB,
    },
    "memory_limit": 10 * GIB,
}


def test_an_estimate_follows_from_what_was_found():
    """The longer of compute and links, then the update; rows fill what the weights leave."""
    chip = Chip(peak=4e9, bandwidth=1e12, links=1e9)
    found = scaling.estimate(FOUND, rows=1, chip=chip)
    update = 7 * GIB / 2 / 1e12
    assert found["seconds"] == pytest.approx(2.0 + update)
    assert found["utilisation"] == pytest.approx(3 / 4 / 2.0, rel=1e-2)
    assert found["largest_rows"] == 2  # 1 row takes 3 GiB; 2 are held, 8 are left


def test_a_table_keeps_each_row_and_compiles_it_once(monkeypatch, tmp_path):
    row, large = scaling.TABLES["slices"][2], scaling.TABLES["slices"][8]
    asked = []

    def compiled(config, topology):
        asked.append((config.method.num_latents, dict(config.mesh), topology))
        if topology == large.topology:
            raise UserError("does not fit: a chip needs 17.09GiB of 15.75GiB; split the batch")
        return FOUND

    monkeypatch.setattr(scaling, "compiled", compiled)
    table = scaling.show([row, large], tmp_path)
    assert scaling.show([row, large], tmp_path) == table
    assert asked == [
        (16, {"data": 4, "fsdp": 16, "traces": 1, "tensor": 1}, "v5p:4x4x4"),
        (16, {"data": 1, "fsdp": 16, "traces": 1, "tensor": 1}, "v5e:4x4"),
    ]
    head, rule, first, second = table.splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert "| 4 x 4 | 2.00 | 5.00 | 10.00 | " in first
    assert "| does not fit: a chip needs 17.09GiB of 15.75GiB |" in second
    assert json.loads((tmp_path / f"{row.name}.json").read_text()) == FOUND


def test_another_mistake_is_not_a_row(monkeypatch, tmp_path):
    def compiled(config, topology):
        raise UserError("--topology: no such slice")

    monkeypatch.setattr(scaling, "compiled", compiled)
    with pytest.raises(UserError, match="no such slice"):
        scaling.show(scaling.TABLES["traces"], tmp_path)
    assert not list(tmp_path.iterdir())


# -- with the compiler for TPUs


def small_gemma():
    """A model that the TPU kernel supports, with matrices that the compiler treats as large."""
    c = base.get_config()
    c.decoder.path, c.decoder.tokenizer = "", "packaged"
    size = dataclasses.replace(
        SIZES["gemma2_test"], embed_dim=1024, head_dim=128, ffn_dim=4096, vocab_size=4096
    )
    c.decoder.architecture = ConfigDict(dataclasses.asdict(size))
    c.method.update(num_latents=4, num_traces=16, num_ahead=4)
    c.data.seq_len, c.train.batch_size, c.compute.remat = 256, 8, "full"
    c.mesh.update(data=2, fsdp=4)
    return c


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "topology, limit", [("v5e:2x4", 15.75), ("v6e:2x4", 31.25), ("v5p:2x2x2", 95.74)]
)
def test_weights_are_gathered_once_per_use(topology, limit):
    """And the token table once.

    The compiler sums some gradients of matrices as small as these whole, where it scatters those of
    true size (docs/scaling.md).
    """
    found = scaling.compiled(small_gemma(), topology)
    assert found["memory_limit"] == limit * GIB
    c = small_gemma().decoder.architecture
    matrices = (
        2
        * c.num_layers
        * c.embed_dim
        * (3 * c.ffn_dim + c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads))
    )
    table = 2 * c.vocab_size * c.embed_dim
    gathered = found["received"]["all-gather"]["received"]
    assert gathered == pytest.approx(3 / 4 * (5 * matrices + table), rel=0.01)
    assert 3 / 4 * matrices < scaling.received(found) - gathered < 2 * matrices
    estimated = scaling.estimate(found, 1, CHIPS[found["chip"]])
    assert 0 < estimated["utilisation"] < 0.5 and estimated["largest_rows"] > 1
