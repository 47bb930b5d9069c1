"""The table of peers: sides take turns. What they do is compared in test_peer.py."""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peer_sides import Work

ROOT = Path(__file__).parents[2]


def side(a, *, figures):
    """Writes down when it works, and where it runs."""

    def run():
        with (a.folder / "log").open("a") as log:
            log.write(f"{figures[0]} {os.getpid()} {os.environ['GLIBC_TUNABLES']}\n")
        time.sleep(0.01)
        return figures

    return Work(run, 10.0)


def broken(a):
    raise RuntimeError("no such library")


def row(**sides):
    return peers.Row("some work", "calls/s", "calls", sides)


@pytest.mark.slow
def test_sides_take_turns(tmp_path, monkeypatch, capsys):
    sides = {
        "ours": partial(side, figures=[1.0, 2.0]),
        "theirs": partial(side, figures=[1.0005, 3.0]),
    }
    monkeypatch.setattr(peers, "ROWS", {"1": (row(**sides),)})
    found = peers.main(
        ["--rounds=3", "--least=0", f"--folder={tmp_path}", f"--json={tmp_path}/table.json"]
    )
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [name for name, _, _ in log] == ["1.0"] * 2 + ["1.0005"] * 2 + ["1.0", "1.0005"] * 3
    assert len({pid for _, pid, _ in log} | {str(os.getpid())}) == 3
    assert {setting for _, _, setting in log} == set(peers.ENVIRONMENT.values())
    [made] = found["rows"]
    assert len(made["ours"]["all"]) == 3 and 0 < made["ours"]["median"] < 1000
    assert made["ratio"]["least"] <= made["ratio"]["median"] <= made["ratio"]["most"]
    assert made["peer"] == "theirs" and made["same"] == 0.5
    assert json.loads((tmp_path / "table.json").read_text()) == found
    printed = capsys.readouterr().out
    assert (
        printed.endswith(f"{peers.table(found['rows'])}\n")
        and "| some work, calls/s | theirs " in printed
    )


@pytest.mark.parametrize("installed", [True, False])
def test_a_row_whose_peer_is_not_installed_is_left_out(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: installed or None)
    rows = {name: (row(ours=partial(side, figures=[1.0])),) for name in ("6", "7")}
    monkeypatch.setattr(peers, "ROWS", rows)
    monkeypatch.setattr(peers, "measure", lambda row, a: {"theirs": {}})
    monkeypatch.setattr(peers, "table", lambda rows: "")
    found = peers.main([f"--json={tmp_path}/table.json"])
    assert len(found["rows"]) == 1 + installed


def test_the_page_has_the_table_of_the_stored_result():
    found = json.loads((ROOT / "docs/results/peers.json").read_text())
    assert peers.table(found["rows"]) in (ROOT / "docs/performance.md").read_text()
    units = {row.work: row.unit for rows in peers.ROWS.values() for row in rows}
    assert {row["work"]: row["unit"] for row in found["rows"]} == units


def test_a_side_that_fails_ends_the_command(tmp_path):
    a = argparse.Namespace(folder=tmp_path, least=0, rounds=1)
    with pytest.raises(SystemExit, match="some work: theirs failed"):
        peers.measure(row(ours=partial(side, figures=[1.0]), theirs=broken), a)


def test_numbers_are_short_and_figures_are_paired():
    assert peers.number(1234.5) == "1,234" and peers.number(0.1234) == "0.123"
    assert peers.share_of_same([1.0], [1.0, 2.0]) == 0


def test_every_row_has_ours_and_a_peer():
    for chosen in peers.ROWS.values():
        assert all("ours" in made.sides and len(made.sides) > 1 for made in chosen)
