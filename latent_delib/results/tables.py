"""The tables of the report: figures of finished runs beside the published ones."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from latent_delib.measure.perplexity import mean_change
from latent_delib.results import published
from latent_delib.results.comparisons import COMPARISONS, entries_in, is_decoder, is_paper_method
from latent_delib.results.entries import (
    Entry,
    asks_the_same,
    entries,
    entry_of,
    labels,
)
from latent_delib.results.published import Variant
from latent_delib.results.runs import BENCHMARKS, PERPLEXITY, Result, Runs
from latent_delib.results.table_format import (
    CHANGE,
    Figure,
    Row,
    Table,
    change,
    score,
    score_change,
)

AHEAD = (1, 2, 4, 8, 16, 32)  # n of Table 1
BY_N = [f"n = {n}" for n in AHEAD]  # columns
COLUMNS = [*BY_N, "mean"]  # the mean is over every n
PUBLISHED = f"published, {published.DECODER}"
# "interval_over" of a perplexity.json, in words.
INTERVALS = {
    "works": "over works",
    "documents": "over documents, each a work of its own",
    "documents of one work": "over the documents of one work",
    None: "over documents, whose works were not kept",
}


def tables(runs: Runs) -> list[Table]:
    """Makes all tables except the tables of `costs` and `against`.

    A table to which no run belongs says so below its published lines.
    """
    every = entries(runs)
    of_paper = [result for result in runs.perplexity if is_paper_method(entry_of(result))]
    by_latents = "Change in perplexity of the n-th token ahead, by number of latents (Table 1)"
    every_run = "Change in perplexity of the n-th token ahead, every run"
    made = [
        _variants("0_runs", "All runs", (), every),
        _perplexity("1_perplexity", by_latents, of_paper, published.PERPLEXITY_CHANGE),
        _benchmarks(every),
    ]
    for each in COMPARISONS:
        made.append(_variants(each.name, each.title, each.lines, entries_in(each, every)))
    made.append(_perplexity("11_every_method", every_run, runs.perplexity, {}))
    made.append(_score_changes(every))
    return made


def _perplexity(
    name: str,
    title: str,
    results: Sequence[Result],
    lines: Mapping[int, Mapping[int, float]],
) -> Table:
    """Makes a table of the change at each n: the published rows and our runs, by latents.

    A run has a row for each source and each work, too, where it has several.

    Args:
      lines: the published ones: number of latents -> n -> change.
    """
    decoder = "decoder, n = 1"
    rows: list[Row] = []
    for latents, by_n in lines.items():
        row = {"latents": latents, "what": PUBLISHED, decoder: Figure(published.FROZEN.ppl)}
        for n, value in by_n.items():
            row[f"n = {n}"] = Figure(value, CHANGE)
        rows.append(row)
    for result, words in zip(results, labels(list(map(entry_of, results)))):
        for part, found in _parts(result.data).items():
            row = {"latents": entry_of(result).latents, "what": words, "from": result.key}
            row |= changes(found)
            if part:
                over = INTERVALS.get(found.get("interval_over"), "")
                row["what"] = f"{words}: {part} alone, interval {over}"
            for each in found["rows"]:
                if each["n"] == 1:
                    row[decoder] = Figure(each["decoder_ppl"])
            rows.append(row)
    rows.sort(key=lambda row: row["latents"])
    return make_table(name, title, ["latents", "what", "from", decoder, *COLUMNS], rows, results)


def changes(part: Mapping[str, Any]) -> Row:
    """Returns cells with the change at each n and in the mean over n, by column.

    part: a perplexity.json, or its part of a source or a work; older files have no "mean".
    """
    cells = {f"n = {row['n']}": change(row) for row in part["rows"]}
    mean = part.get("mean") or {"change_percent": mean_change(part["rows"])}
    return cells | {"mean": change(mean)}


def _parts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a perplexity.json by name; "" is all of it.

    Each source and each work is a part, where there are several.
    """
    parts = {"": data}
    sources = data.get("sets") or {}
    for source, part in sources.items():
        works = part.get("works") or {}
        if len(sources) > 1:
            parts[source] = part
        if len(works) > 1:
            for work, found in works.items():
                parts[f"{work} of {source}"] = found
    return parts


def _benchmarks(every: Sequence[Entry]) -> Table:
    """Makes Table 2: for each benchmark the published line, then our lines."""
    decoders = list(filter(is_decoder, every))
    ours = list(filter(is_paper_method, every))
    names = dict.fromkeys(published.BENCHMARKS)
    latents = set(published.LATENTS)
    for entry in [*decoders, *ours]:
        names |= dict.fromkeys(entry.scores)
        if entry.scores and entry.latents:
            latents.add(entry.latents)
    rows: list[Row] = []
    for name in names:
        for line in [*_published_line(name), *_lines(name, [*ours, *decoders])]:
            rows.append(line | {"benchmark": _title(name)})
    used = []
    for entry in [*ours, *decoders]:
        for result in entry.results:
            if result.path.name == BENCHMARKS:
                used.append(result)
    columns = ["benchmark", "setting", "what", *map(_score_column, (0, *sorted(latents)))]
    title = "Benchmarks, by number of latents (Table 2)"
    return make_table("2_benchmarks", title, columns, rows, used)


def _score_column(latents: int) -> str:
    return f"{latents} latents" if latents else "decoder"


def _published_line(benchmark: str) -> list[Row]:
    """Returns the published line of a benchmark, if there is one."""
    known = published.BENCHMARKS.get(benchmark)
    if known is None:
        return []
    line: Row = {"setting": known.setting, "what": PUBLISHED}
    for latents, value in known.scores.items():
        line[_score_column(latents)] = Figure(value)
    return [line]


class _Line(NamedTuple):
    """Holds a line for a benchmark.

    decoder: the fingerprint of the decoder.
    asked: the first row of benchmarks.json that is on the line.
    """

    decoder: str
    label: str
    asked: dict[str, Any]
    cells: Row

    def takes(self, decoder: str, row: dict[str, Any], column: str) -> bool:
        """Tells whether a row of benchmarks.json can stand in a column of this line."""
        is_free = column not in self.cells
        return is_free and self.decoder == decoder and asks_the_same(row, self.asked)


def _lines(benchmark: str, models: Sequence[Entry]) -> list[Row]:
    """Returns our lines for a benchmark; models that differ only in their latents share one.

    A decoder's score is added to the lines of the models that use it, or gets a line of its own if
    there are none. All figures of a line are of the same questions.
    """
    lines: list[_Line] = []
    scored = [entry for entry in models if benchmark in entry.scores]
    for entry, words in zip(scored, labels(scored, of_perplexity=False)):
        row, result = entry.scores[benchmark]
        figure = score(row, result.key)
        column = _score_column(entry.latents)
        decoder = result.data["fingerprint"]
        chosen = [line for line in lines if line.takes(decoder, row, column)]
        if not is_decoder(entry):  # it stands on one line, the first that has its words
            chosen = [line for line in chosen if line.label == words][:1]
        if not chosen:
            chosen = [_Line(decoder, words, row, {"what": words, "setting": _setting(row)})]
            lines += chosen
        for line in chosen:
            line.cells[column] = figure
    # Lines of one decoder and label stand together, in the order of their first.
    groups: dict[tuple[str, str], list[Row]] = {}
    for line in lines:
        groups.setdefault((line.decoder, line.label), []).append(line.cells)
    return [cells for group in groups.values() for cells in group]


def _setting(row: dict[str, Any]) -> str:
    """Says how a benchmark was run."""
    words = [row["metric"]] if row.get("metric") else []
    if row.get("shots") is not None:
        words.append(f"{row['shots']}-shot")
    if row.get("documents"):
        words.append(f"{row['documents']:,} documents")
    return ", ".join(words)


def _variants(name: str, title: str, lines: Sequence[Variant], ours: Sequence[Entry]) -> Table:
    """Makes a table of perplexity of the first token ahead, and of our benchmarks."""
    benchmarks = {"gsm8k": None}
    rows = [_published_row(line) for line in lines]
    used: list[Result] = []
    for entry, words in zip(ours, labels(ours)):
        benchmarks |= dict.fromkeys(entry.scores)
        rows.append(_row(entry, words))
        used += entry.results
    columns = ["what", "latents", "from", "decoder, ppl n = 1", "ppl n = 1", "change"]
    columns += map(_title, benchmarks)
    return make_table(name, title, columns, rows, used)


def _score_changes(every: Sequence[Entry]) -> Table:
    """Makes a table of benchmarks: how each model differs from its decoder, question by question.

    Files of older versions do not say it.
    """
    benchmarks: dict[str, None] = {}
    rows: list[Row] = []
    used: list[Result] = []
    for entry, words in zip(every, labels(every)):
        found: Row = {}
        for benchmark, (scored, _) in entry.scores.items():
            if "change" in scored:
                found[_title(benchmark)] = score_change(scored)
        if found:
            benchmarks |= dict.fromkeys(found)
            rows.append(first_cells(entry, words) | found)
            used += entry.results
    title = "Benchmarks: change against the decoder on the same questions, in the scores' unit"
    columns = ["what", "latents", "from", *benchmarks]
    return make_table("14_score_changes", title, columns, rows, used)


def _title(benchmark: str) -> str:
    """Returns the name that the paper has for a benchmark, or ours."""
    known = published.BENCHMARKS.get(benchmark)
    return known.title if known else benchmark


def _published_row(line: Variant) -> Row:
    """Returns a published line: perplexity before and after, its change, GSM8K."""
    before = published.FROZEN.ppl
    row: Row = {"what": line.what, "latents": line.latents or "", "from": PUBLISHED}
    if line.ppl:
        row |= {"decoder, ppl n = 1": Figure(before), "ppl n = 1": Figure(line.ppl)}
        if line is not published.FROZEN:
            row["change"] = Figure(100 * (line.ppl / before - 1), CHANGE)
    if line.gsm8k is not None:
        row[_title("gsm8k")] = Figure(line.gsm8k)
    return row


def _row(entry: Entry, words: str) -> Row:
    """Returns our line: perplexity of the first token ahead, its change, and benchmarks."""
    row = first_cells(entry, words)
    first = entry.perplexity
    if first:
        row |= {
            "decoder, ppl n = 1": Figure(first["decoder_ppl"]),
            "ppl n = 1": Figure(first["augmented_ppl"]),
        }
        if entry.trained or not is_decoder(entry):
            row["change"] = change(first)
    for benchmark, (scored, _) in entry.scores.items():
        row[_title(benchmark)] = score(scored)
    return row


def first_cells(entry: Entry, words: str) -> Row:
    """Returns the first cells of our line: the model in words, its latents, and its files."""
    keys = [result.key for result in entry.results]
    return {"what": words, "latents": entry.latents or "", "from": " ".join(keys)}


def make_table(
    name: str, title: str, columns: list[str], rows: Sequence[Row], results: Iterable[Result]
) -> Table:
    """Makes a table of rows, with its note, and where the figures of `results` come from.

    Args:
      rows: cells by column; a missing cell is blank.
    """
    in_order = sorted(results, key=lambda result: (result.path.name, int(result.key[1:])))
    used = {result.key: result for result in in_order}
    if not used:
        rows = [*rows, {columns[0]: "no run of ours"}]
    cells = []
    for row in rows:
        cells.append([row.get(column, "") for column in columns])
    if not used:
        return Table(name, title, columns, cells, "", [])
    decoders = ", ".join(dict.fromkeys(result.decoder for result in used.values()))
    note = (
        f"Ours are on {decoders}, the published on {published.DECODER}: "
        "compare changes in percent, not absolute figures. "
        f"Brackets: 95 % interval{_over(used.values())}. Blank: not published, or not measured."
    )
    return Table(name, title, columns, cells, note, list(map(_origin, used.values())))


def _over(results: Iterable[Result]) -> str:
    """Says what intervals of perplexity are over; if kinds differ, with the keys of each."""
    keys: dict[str, list[str]] = {}
    for result in results:
        if result.path.name == PERPLEXITY:
            drawn = result.data.get("interval_over")
            keys.setdefault(INTERVALS.get(drawn, f"over {drawn}"), []).append(result.key)
    if not keys:
        return ""
    if len(keys) == 1:
        (words,) = keys
    else:
        words = "; ".join(f"{kind} ({' '.join(of)})" for kind, of in keys.items())
    return f", of perplexity {words}"


def _origin(result: Result) -> str:
    """Says in a line where a file's figures come from, as far as the file tells."""
    data = result.data
    provenance = data.get("provenance") or {}
    words = [
        f"{result.key}: {result.path}",
        f"checkpoint {result.checkpoint or 'none'}",
        f"decoder {result.decoder}",
    ]
    if data.get("documents"):
        words.append(f"{data['documents']:,} documents")
    for name in ("date", "hardware", "command"):
        if provenance.get(name):
            words.append(str(provenance[name]))
    return "; ".join(words)
