"""The tables of the report: figures of finished runs beside the published ones."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from latent_delib.results import published
from latent_delib.results.comparisons import COMPARISONS, entries_in, is_decoder, is_paper_method
from latent_delib.results.entries import Entry, entries, entry_of, label, labels, text_of
from latent_delib.results.forms import CHANGE, Cell, Figure, Table, change, score
from latent_delib.results.published import Variant
from latent_delib.results.runs import BENCHMARKS, PERPLEXITY, Result, Runs

AHEAD = (1, 2, 4, 8, 16, 32)  # n of Table 1
PUBLISHED = f"published, {published.DECODER}"
# "interval_over" of a perplexity.json, in words.
INTERVALS = {
    "works": "over works",
    "documents": "over documents, each a work of its own",
    "documents of one work": "over the documents of one work",
    None: "over documents, whose works were not kept",
}


def tables(runs: Runs) -> list[Table]:
    """Makes all tables: all runs, the paper's eight, three more. One without a run says so below published lines."""
    every = entries(runs)
    of_paper = [result for result in runs.perplexity if is_paper_method(entry_of(result))]
    by_latents = "Change in perplexity of the n-th token ahead, by number of latents (Table 1)"
    every_run = "Change in perplexity of the n-th token ahead, every run"
    comparisons = []
    for each in COMPARISONS:
        ours = entries_in(each, every)
        comparisons.append(_variants(each.name, f"{each.title} (Section 3)", each.lines, ours))
    return [
        _variants("0_runs", "All runs", (), every),
        _perplexity("1_perplexity", by_latents, of_paper, published.PERPLEXITY_CHANGE),
        _benchmarks([e for e in every if is_paper_method(e)], [e for e in every if is_decoder(e)]),
        *comparisons,
        _perplexity("11_every_method", every_run, runs.perplexity),
    ]


def _perplexity(
    name: str,
    title: str,
    results: Sequence[Result],
    lines: Mapping[int, Mapping[int, float]] = MappingProxyType({}),
) -> Table:
    """Makes a table with a row for each published number of latents and for each of our runs, by number of latents.

    A run has a row for each source and each work, too, where it has several.

    Args:
      lines: the published ones: number of latents -> n -> change.
    """
    rows: list[list[Cell]] = []
    for latents, by_n in lines.items():
        cells = [Figure(by_n[n], CHANGE) for n in AHEAD]
        rows.append([latents, PUBLISHED, "", Figure(published.FROZEN.ppl), *cells])
    for result, words in zip(results, labels(results)):
        latents = entry_of(result).latents
        for part, found in _parts(result.data).items():
            what = words
            if part:
                what = f"{words}: {part} alone, interval {INTERVALS.get(found.get('interval_over'), '')}"
            first = [row for row in found["rows"] if row["n"] == 1]
            decoder = Figure(first[0]["decoder_ppl"]) if first else ""
            rows.append([latents, what, result.key, decoder, *changes(found["rows"])])
    columns = ["latents", "what", "from", "decoder, n = 1", *n_columns()]
    rows.sort(key=lambda row: row[0])
    return finished(name, title, columns, rows, results)


def n_columns() -> list[str]:
    return [f"n = {n}" for n in AHEAD]


def changes(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """Returns the cells of `n_columns` for rows of a perplexity.json."""
    by_n = {row["n"]: row for row in rows}
    return [change(by_n[n]) if n in by_n else "" for n in AHEAD]


def _parts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a perplexity.json: all of it, named "", and where there are several each source and work."""
    parts = {"": data}
    sources = data.get("sets") or {}
    for source, part in sources.items():
        works = part.get("works") or {}
        if len(sources) > 1:
            parts[source] = part
        if len(works) > 1:
            parts |= {f"{work} of {source}": found for work, found in works.items()}
    return parts


@dataclasses.dataclass
class _Line:
    """A line of Table 2. scores: number of latents -> figure; 0 is the decoder."""

    what: str
    setting: str
    scores: dict[int, Cell]


def _benchmarks(ours: Sequence[Entry], decoders: Sequence[Entry]) -> Table:
    """Makes Table 2: for each benchmark the published line, then a line for each kind of our runs."""
    models = [*ours, *decoders]
    latents = sorted({*published.LATENTS, *(e.latents for e in ours if e.scores)})
    names = dict.fromkeys(published.BENCHMARKS)
    for entry in [*decoders, *ours]:
        names |= dict.fromkeys(entry.scores)
    rows: list[list[Cell]] = []
    for name in names:
        for line in [*_published_line(name), *_lines(name, models)]:
            scores = [line.scores.get(n, "") for n in (0, *latents)]
            rows.append([_title(name), line.setting, line.what, *scores])
    columns = ["benchmark", "setting", "what", "decoder", *(f"{n} latents" for n in latents)]
    used = [result for entry in models for result in entry.results if result.path.name == BENCHMARKS]
    return finished("2_benchmarks", "Benchmarks, by number of latents (Table 2)", columns, rows, used)


def _published_line(benchmark: str) -> list[_Line]:
    """Returns the published line of a benchmark, if there is one."""
    known = published.BENCHMARKS.get(benchmark)
    if known is None:
        return []
    return [_Line(PUBLISHED, known.setting, {n: Figure(value) for n, value in known.scores.items()})]


def _lines(benchmark: str, models: Sequence[Entry]) -> list[_Line]:
    """Returns our lines for a benchmark. Models that differ in their number of latents alone share a line.

    A decoder joins the lines of all that stand on it, and has one of its own where there are none.
    """
    groups: dict[tuple[str, str], list[_Line]] = {}  # (fingerprint of the decoder, label) -> lines
    for entry in models:
        if benchmark not in entry.scores:
            continue
        row, result = entry.scores[benchmark]
        decoder, figure = result.data["fingerprint"], score(row, result.key)
        above = [line for (below, _), group in groups.items() if below == decoder for line in group]
        if is_decoder(entry) and above:
            for line in above:
                line.scores[0] = figure
            continue
        group = groups.setdefault((decoder, label(entry)), [])
        free = [line for line in group if entry.latents not in line.scores]
        if not free:
            free = [_Line(label(entry), _setting(row), {})]
            group += free
        free[0].scores[entry.latents] = figure
    return [line for group in groups.values() for line in group]


def _setting(row: dict[str, Any]) -> str:
    """Says how a benchmark was run."""
    words = [row["metric"]] if row.get("metric") else []
    if row.get("shots") is not None:
        words.append(f"{row['shots']}-shot")
    if row.get("documents"):
        words.append(f"{row['documents']:,} documents")
    return ", ".join(words)


def _variants(name: str, title: str, lines: Sequence[Variant], ours: Sequence[Entry]) -> Table:
    """Makes a table of perplexity of the first token ahead and of every benchmark that ours have, GSM8K first."""
    benchmarks = {"gsm8k": None}
    for entry in ours:
        benchmarks |= dict.fromkeys(entry.scores)
    rows = [_published_row(line, len(benchmarks)) for line in lines]
    texts = {text_of(entry.result) for entry in ours if entry.perplexity}
    used: list[Result] = []
    for entry in ours:
        what = label(entry)
        if entry.perplexity and len(texts) > 1:
            what += f", on {text_of(entry.result)}"
        keys = " ".join(result.key for result in entry.results)
        scores = [score(entry.scores[b][0]) if b in entry.scores else "" for b in benchmarks]
        rows.append([what, entry.latents or "", keys, *_first_token(entry), *scores])
        used += entry.results
    columns = ["what", "latents", "from", "decoder, ppl n = 1", "ppl n = 1", "change", *map(_title, benchmarks)]
    return finished(name, title, columns, rows, used)


def _title(benchmark: str) -> str:
    """Returns the name that the paper has for a benchmark, or ours."""
    known = published.BENCHMARKS.get(benchmark)
    return known.title if known else benchmark


def _published_row(line: Variant, num_benchmarks: int) -> list[Cell]:
    """Returns a published line: perplexity before and after, its change, GSM8K, and blanks for other benchmarks."""
    before, after = published.FROZEN.ppl, line.ppl
    cells: list[Cell] = [line.what, line.latents or "", PUBLISHED]
    cells += [Figure(before), Figure(after)] if after else ["", ""]
    is_change = after and line is not published.FROZEN
    cells.append(Figure(100 * (after / before - 1), CHANGE) if is_change else "")
    cells.append("" if line.gsm8k is None else Figure(line.gsm8k))
    return cells + [""] * (num_benchmarks - 1)


def _first_token(entry: Entry) -> list[Cell]:
    """Returns perplexity of the first token ahead: the decoder's, ours, and the change; a frozen decoder has none."""
    row = entry.perplexity
    if row is None:
        return ["", "", ""]
    is_frozen = is_decoder(entry) and not entry.trained
    return [Figure(row["decoder_ppl"]), Figure(row["augmented_ppl"]), "" if is_frozen else change(row)]


def finished(
    name: str,
    title: str,
    columns: list[str],
    rows: list[list[Cell]],
    results: Iterable[Result],
    over: Mapping[str, str | None] | None = None,
) -> Table:
    """Adds to a table its note, and where the figures of `results` come from.

    Args:
      over: key of a result -> what its intervals are over, a key of INTERVALS; None: as the files say.
    """
    in_order = sorted(results, key=lambda result: (result.path.name, int(result.key[1:])))
    used = {result.key: result for result in in_order}
    if not used:
        blank = [""] * (len(columns) - 1)
        return Table(name, title, columns, [*rows, ["no run of ours", *blank]], "", [])
    if over is None:
        of_perplexity = [result for result in used.values() if result.path.name == PERPLEXITY]
        over = {result.key: result.data.get("interval_over") for result in of_perplexity}
    decoders = ", ".join(dict.fromkeys(result.decoder for result in used.values()))
    note = (
        f"Ours are on {decoders}, the published on {published.DECODER}: changes in percent compare, absolute figures "
        f"do not. Brackets: 95 % interval{_over(over)}. Blank: not published, or not measured."
    )
    return Table(name, title, columns, rows, note, [_origin(result) for result in used.values()])


def _over(over: Mapping[str, str | None]) -> str:
    """Says what intervals of perplexity are over, with the keys of each kind where there are several."""
    keys: dict[str, list[str]] = {}
    for key, drawn in over.items():
        keys.setdefault(INTERVALS.get(drawn, f"over {drawn}"), []).append(key)
    if not keys:
        return ""
    if len(keys) == 1:
        (words,) = keys
    else:
        words = "; ".join(f"{kind} ({' '.join(of)})" for kind, of in keys.items())
    return f", of perplexity {words}"


def _origin(result: Result) -> str:
    """Says in a line where a file's figures come from; a blank where an older file does not tell."""
    data = result.data
    provenance = data.get("provenance") or {}
    words = [
        f"{result.key}: {result.path}",
        f"checkpoint {result.checkpoint or 'none'}",
        f"decoder {result.decoder}",
    ]
    if data.get("documents"):
        words.append(f"{data['documents']:,} documents")
    words += [str(provenance[name]) for name in ("date", "hardware", "command") if provenance.get(name)]
    return "; ".join(words)
