"""The tables: figures of finished runs beside the published ones, and a table in Markdown, CSV and HTML."""

import csv
import dataclasses
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from latent_delib.results import published
from latent_delib.results.published import Variant
from latent_delib.results.runs import Result, Runs

AHEAD = (1, 2, 4, 8, 16, 32)  # n of Table 1
CHANGE, SCORE = "{:+.2f}%", "{:.2f}"
# "interval_over" of a perplexity.json, in words.
INTERVALS = {
    "works": "over works",
    "documents": "over documents, each a work of its own",
    "documents of one work": "over the documents of one work",
    None: "over documents, whose works were not kept",
}
TRAIN_DECODER = ("decoder", "joint", "unified")  # methods whose checkpoints have a decoder of their own


class Figure(NamedTuple):
    """A figure with its 95 % interval where that is known, and the key of its file where a row has several."""

    value: float
    form: str = SCORE
    low: float | None = None
    high: float | None = None
    key: str = ""

    def __str__(self) -> str:
        text = self.form.format(self.value)
        if self.low is not None and self.high is not None:
            low, high = (self.form.rstrip("%").format(x) for x in (self.low, self.high))
            text += f" [{low}, {high}]"
        return f"{text} {self.key}".rstrip()


Cell = str | int | Figure


class Table(NamedTuple):
    """name: of its files. rows: cells as many as columns. note: a line below. origins: of the figures, a line each."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str
    origins: list[str]


@dataclasses.dataclass
class Entry:
    """What one model came to: a line of the tables of variants.

    results: the files it is from, at least one. model: "augmented", "decoder" or "zero_shot_cot".
    perplexity: of the first token ahead. scores: benchmark -> its row, and its file.
    """

    results: list[Result]
    model: str
    delay: int = 0
    every: int = 0
    perplexity: dict[str, Any] | None = None
    scores: dict[str, tuple[dict[str, Any], Result]] = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> Result:
        return self.results[0]

    @property
    def method(self) -> str:
        """Names what latents come from, "lora" where only adapters of it were trained; "" where there are none."""
        method = self.result.method
        return ("lora" if method.get("lora_rank") else method["name"]) if self.model == "augmented" else ""

    @property
    def trained(self) -> bool:
        """Tells whether this is a decoder alone that was itself trained."""
        data, name = self.result.data, self.result.method["name"]
        return self.model != "augmented" and name in TRAIN_DECODER and bool(data.get("checkpoint"))

    @property
    def latents(self) -> int:
        return self.result.method["num_latents"] if self.model == "augmented" else 0


def of(result: Result) -> Entry:
    """Makes the entry of a perplexity.json alone."""
    model = "decoder" if result.method["name"] == "decoder" else "augmented"
    return Entry([result], model, controls(result)["delay"] or 0)


def entries(runs: Runs) -> list[Entry]:
    """Collects perplexity and benchmarks of a checkpoint in one entry; decoders first, then by number of latents.

    Each text, each control, and each other evaluation that came to other figures has an entry of its own.
    """
    found: dict[tuple, Entry] = {}
    first: dict[tuple, tuple] = {}  # how the perplexity was made that benchmarks stand beside

    def entry(result: Result, model: str, delay: int, every: int, how: tuple | None = None) -> Entry:
        decoder, checkpoint = result.data["fingerprint"], result.data.get("checkpoint")
        if result.method["name"] in TRAIN_DECODER and checkpoint:
            decoder = ""  # benchmarks tell of the one trained, perplexity of the one it is compared with
        elif model != "augmented":
            checkpoint = None
        identity = (decoder, checkpoint, model, delay, every)
        if how is not None and not any(how[-1]):
            first.setdefault(identity, how)
        one = found.setdefault((identity, how or first.get(identity)), Entry([result], model, delay, every))
        if result not in one.results:
            one.results.append(result)
        return one

    for result in runs.perplexity:
        how = (text_of(result), json.dumps(result.data["rows"]), tuple(controls(result).values()))
        entry(result, of(result).model, of(result).delay, 0, how).perplexity = result.data["rows"][0]
    for result in runs.benchmarks:
        for row in result.data["rows"]:
            one = entry(result, row["model"], row.get("delay") or 0, row.get("every") or 0)
            one.scores.setdefault(row["benchmark"], (row, result))
    return sorted(found.values(), key=lambda e: (e.model == "augmented", e.latents, e.delay, e.every))


def text_of(result: Result) -> str:
    """Names the validation sources of a perplexity.json."""
    return ", ".join(result.data["config"].get("data", {}).get("validation", ()))


def controls(result: Result) -> dict[str, Any]:
    """Returns the controls of a perplexity.json: keys that change the latents or the text."""
    evaluated = result.data["config"].get("evaluate", {})
    return {key: evaluated.get(key) for key in ("swap", "delay", "longer_prompt")}


def controls_in_words(evaluated: Mapping[str, Any]) -> list[str]:
    """Says in words what a config's `evaluate` does to the latents or to the text."""
    words = []
    if delay := evaluated.get("delay"):
        words += [f"delay {delay}"]
    if evaluated.get("swap"):
        words += ["latents of another text"]
    if lost := evaluated.get("longer_prompt"):
        words += [f"without the first {lost} tokens that the decoder reads"]
    return words


def label(entry: Entry) -> str:
    """Says in words what an entry is; the number of latents has a column of its own."""
    method, data, done = entry.result.method, entry.result.data, controls(entry.result)
    if entry.model != "augmented" and not entry.trained:
        return {"decoder": "frozen decoder", "zero_shot_cot": "zero-shot CoT"}.get(entry.model, entry.model)
    words = [method["name"].replace("_", " "), method.get("placement", "")]
    words += [f"{key.replace('_', ' ')} {value}" for key, value in (method.get("coprocessor") or {}).items()]
    if entry.trained:
        words = ["zero-shot CoT" if entry.model == "zero_shot_cot" else ""]
        words += ["trained decoder", "" if method["name"] == "decoder" else f"of {method['name']}, without its latents"]
    words += [f"{key.removeprefix('lora_')} {method[key]}" for key in method if key.endswith("rank") and method[key]]
    words += [f"{method['num_ahead']} ahead tokens"] if "num_ahead" in method and not entry.trained else []
    words += [f"step {entry.result.step:,}"] if entry.result.step else []
    words += [f"seed {data['config']['seed']}"] if "seed" in data["config"] else []
    words += [f"latents every {entry.every} tokens"] if entry.every else []
    words += [f"delay {entry.delay}"] if entry.delay else []
    words += [f"trained for delays up to {method['max_delay']}"] if method.get("max_delay") else []
    words += [f"begun with {method['start']}"] if method.get("start") else []
    words += controls_in_words({key: done[key] for key in ("swap", "longer_prompt")})
    return ", ".join(word for word in words if word)


def labels(results: Sequence[Result]) -> list[str]:
    """Says in words what each perplexity.json is; on which text, too, where that is not the same for all."""
    several = len({text_of(r) for r in results}) > 1
    return [label(of(r)) + (f", on {text_of(r)}" if several else "") for r in results]


def change(row: dict[str, Any]) -> Figure:
    """Makes the figure of a row of perplexity.json."""
    return Figure(row["change_percent"], CHANGE, row.get("change_low"), row.get("change_high"))


def score(row: dict[str, Any], key: str = "") -> Figure:
    """Makes the figure of a row of benchmarks.json."""
    return Figure(row["value"], SCORE, row.get("low"), row.get("high"), key)


def tables(runs: Runs) -> list[Table]:
    """Makes all tables: all runs, the paper's eight, three more. One without a run says so below published lines."""
    every = entries(runs)
    full, late = "cache_augmentation", {e.result.data.get("checkpoint") for e in every if e.delay}

    def variants(
        name: str, title: str, lines: Sequence[Variant], about: Callable[[Entry], Any], beside: Callable[[Entry], Any]
    ) -> Table:
        """Makes a table of what it is `about`, and of what else belongs `beside` that, if there is any of it."""
        chosen = [e for e in every if about(e) or beside(e)] if any(about(e) for e in every) else []
        return _variants(name, f"{title} (Section 3)", lines, chosen)

    def at_once(e: Entry) -> bool:
        return e.method == full and not any(controls(e.result).values()) and not e.delay

    def decoder(e: Entry) -> bool:
        return e.model == "decoder"

    def both(e: Entry) -> bool:
        return decoder(e) or at_once(e)

    return [
        _variants("0_runs", "All runs", (), every),
        _perplexity(
            "1_perplexity",
            "Change in perplexity of the n-th token ahead, by number of latents (Table 1)",
            [r for r in runs.perplexity if at_once(of(r))],
            published.PERPLEXITY_CHANGE,
        ),
        _benchmarks([e for e in every if at_once(e)], [e for e in every if decoder(e)]),
        variants(
            "3_pause_tokens",
            "Pause tokens (Goyal et al. 2023) against cache augmentation",
            published.PAUSE_TOKENS,
            lambda e: e.method in ("pause_tokens", "static_tokens"),
            both,
        ),
        variants(
            "4_zero_shot_cot",
            "Zero-shot chain of thought against cache augmentation",
            published.ZERO_SHOT_COT,
            lambda e: e.model == "zero_shot_cot",
            both,
        ),
        variants(
            "5_coprocessors",
            "Coprocessors from scratch and as low-rank parts",
            published.COPROCESSORS,
            lambda e: e.method in ("from_scratch", "lora"),
            both,
        ),
        variants(
            "6_last_layer",
            "Last-layer activations instead of the cache",
            published.LAST_LAYER,
            lambda e: e.method == "last_layer",
            both,
        ),
        variants("7_ahead_tokens", "Ahead tokens in training", published.NUM_AHEAD, at_once, decoder),
        variants(
            "8_asynchronous",
            "Asynchronous coprocessor: latents that come some tokens late",
            published.DELAY,
            lambda e: e.delay,
            lambda e: decoder(e) or at_once(e) and e.result.data.get("checkpoint") in late,
        ),
        variants(
            "9_follow_up",
            "Keys and values inserted (H1), joint training (H2), one model for both (Coda-Forno et al. 2025)",
            (),
            lambda e: e.method in ("inserted", "joint", "unified"),
            both,
        ),
        variants(
            "10_beyond",
            "Latents one after another, and coprocessors of another size",
            (),
            lambda e: e.method in ("sequential", "resized"),
            lambda e: both(e) or e.method == "from_scratch",  # as a coprocessor of another size begins
        ),
        _perplexity("11_every_method", "Change in perplexity of the n-th token ahead, every run", runs.perplexity),
    ]


def _perplexity(
    name: str, title: str, results: Sequence[Result], lines: Mapping[int, Mapping[int, float]] = MappingProxyType({})
) -> Table:
    """Makes a row for each published number of latents and for each of ours, by number of latents, and for each source
    and work of ours where there are several; a row says on which text it is where that is not the same for all."""
    rows: list[list[Cell]] = []
    for latents, by_n in lines.items():
        cells = [Figure(by_n[n], CHANGE) for n in AHEAD]
        rows.append([latents, f"published, {published.DECODER}", "", Figure(published.FROZEN.ppl), *cells])
    for result, what in zip(results, labels(results)):
        for where, part in _parts(result.data).items():
            by_n = {row["n"]: row for row in part["rows"]}
            cells = [change(by_n[n]) if n in by_n else "" for n in AHEAD]
            first = Figure(by_n[1]["decoder_ppl"]) if 1 in by_n else ""
            words = what
            if where:
                words = f"{what}: {where} alone, interval {INTERVALS.get(part.get('interval_over'), '')}"
            rows.append([of(result).latents, words, result.key, first, *cells])
    columns = ["latents", "what", "from", "decoder, n = 1", *(f"n = {n}" for n in AHEAD)]
    rows.sort(key=lambda row: row[0])
    return finished(name, title, columns, rows, results)


def _parts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the parts of a perplexity.json: all of it, named "", and where there are several each source and work."""
    parts, sets = {"": data}, data.get("sets") or {}
    for source, part in sets.items():
        if len(sets) > 1:
            parts[source] = part
        works = part.get("works") or {}
        if len(works) > 1:
            parts |= {f"{work} of {source}": found for work, found in works.items()}
    return parts


def _benchmarks(ours: Sequence[Entry], decoders: Sequence[Entry]) -> Table:
    """Makes Table 2: of each benchmark the published line, then ours, a line for each kind of run."""
    latents = sorted({*published.LATENTS, *(e.latents for e in ours if e.scores)})
    rows: list[list[Cell]] = []
    for benchmark in dict.fromkeys([*published.BENCHMARKS, *(b for e in [*decoders, *ours] for b in e.scores)]):
        known = published.BENCHMARKS.get(benchmark)
        title = known.title if known else benchmark
        if known:
            cells = [Figure(known.scores[n]) if n in known.scores else "" for n in (0, *latents)]
            rows.append([title, known.setting, f"published, {published.DECODER}", *cells])
        for what, setting, by_latents in _lines(benchmark, [*ours, *decoders]):
            rows.append([title, setting, what, *(by_latents.get(n, "") for n in (0, *latents))])
    columns = ["benchmark", "setting", "what", "decoder", *(f"{n} latents" for n in latents)]
    used = [r for e in [*decoders, *ours] for r in e.results if r.path.name == "benchmarks.json"]
    return finished("2_benchmarks", "Benchmarks, by number of latents (Table 2)", columns, rows, used)


def _lines(benchmark: str, models: Sequence[Entry]) -> list[tuple[str, str, dict[int, Cell]]]:
    """Returns (what, setting, number of latents -> figure): models that differ in nothing but that number share a line.

    A decoder joins the lines of all that stand on it, and has one of its own where there are none.
    """
    lines: dict[tuple[str, str], list[tuple[str, str, dict[int, Cell]]]] = {}
    for e in models:
        if benchmark not in e.scores:
            continue
        row, result = e.scores[benchmark]
        decoder, figure = result.data["fingerprint"], score(row, result.key)
        if e.model == "decoder" and (above := [x for kind, of in lines.items() if kind[0] == decoder for x in of]):
            for _, _, by_latents in above:
                by_latents[0] = figure
            continue
        alike = lines.setdefault((decoder, label(e)), [])
        if (line := next((x for x in alike if e.latents not in x[2]), None)) is None:
            words = [row.get("metric") or "", f"{row['shots']}-shot" if row.get("shots") is not None else ""]
            words += [f"{row['documents']:,} documents"] if row.get("documents") else []
            alike.append(line := (label(e), ", ".join(filter(None, words)), {}))
        line[2][e.latents] = figure
    return [line for alike in lines.values() for line in alike]


def _variants(name: str, title: str, lines: Sequence[Variant], ours: Sequence[Entry]) -> Table:
    """Makes a table of perplexity of the first token ahead, and every benchmark that ours have, GSM8K first."""
    benchmarks = list(dict.fromkeys(["gsm8k", *(b for e in ours for b in e.scores)]))
    titles = [published.BENCHMARKS[b].title if b in published.BENCHMARKS else b for b in benchmarks]
    rows: list[list[Cell]] = []
    for line in lines:
        before, after = published.FROZEN.ppl, line.ppl
        row = [Figure(before), Figure(after)] if after else ["", ""]
        row += [Figure(100 * (after / before - 1), CHANGE) if after and line is not published.FROZEN else ""]
        gsm8k = "" if line.gsm8k is None else Figure(line.gsm8k)
        blank = [""] * (len(titles) - 1)
        rows.append([line.what, line.latents or "", f"published, {published.DECODER}", *row, gsm8k, *blank])
    texts = {text_of(e.result) for e in ours if e.perplexity}
    for e in ours:
        p = e.perplexity
        row = [Figure(p["decoder_ppl"]), Figure(p["augmented_ppl"]), change(p)] if p else [""] * 3
        if p and e.model == "decoder" and not e.trained:
            row[2] = ""
        scores = [score(e.scores[b][0]) if b in e.scores else "" for b in benchmarks]
        what = label(e) + (f", on {text_of(e.result)}" if p and len(texts) > 1 else "")
        rows.append([what, e.latents or "", " ".join(r.key for r in e.results), *row, *scores])
    columns = ["what", "latents", "from", "decoder, ppl n = 1", "ppl n = 1", "change", *titles]
    return finished(name, title, columns, rows, [r for e in ours for r in e.results])


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
      over: what the intervals of each key are over, a key of INTERVALS; None: what the files say of theirs.
    """
    used = {r.key: r for r in sorted(results, key=lambda r: (r.path.name, int(r.key[1:])))}
    if not used:
        return Table(name, title, columns, [*rows, ["no run of ours", *[""] * (len(columns) - 1)]], "", [])
    if over is None:
        over = {r.key: r.data.get("interval_over") for r in used.values() if r.path.name == "perplexity.json"}
    decoders = ", ".join(dict.fromkeys(r.decoder for r in used.values()))
    note = (
        f"Ours are on {decoders}, the published on {published.DECODER}: changes in percent compare, absolute figures "
        f"do not. Brackets: 95 % interval{_over(over)}. Blank: not published, or not measured."
    )
    return Table(name, title, columns, rows, note, [origin(r) for r in used.values()])


def _over(over: Mapping[str, str | None]) -> str:
    """Says what intervals of perplexity are over, with the keys of each kind where there are several."""
    keys: dict[str, list[str]] = {}
    for key, drawn in over.items():
        keys.setdefault(INTERVALS.get(drawn, f"over {drawn}"), []).append(key)
    words = [f"{kind} ({' '.join(of)})" if len(keys) > 1 else kind for kind, of in keys.items()]
    return f", of perplexity {'; '.join(words)}" if words else ""


def origin(result: Result) -> str:
    """Says in a line where a file's figures come from; what an older file does not tell is left out."""
    data, p = result.data, result.data.get("provenance") or {}
    words = [
        f"{result.key}: {result.path}",
        f"checkpoint {data.get('checkpoint') or 'none'}",
        f"decoder {result.decoder}",
    ]
    words += [f"{data['documents']:,} documents"] if data.get("documents") else []
    words += [str(p[name]) for name in ("date", "hardware", "command") if p.get(name)]
    return "; ".join(words)


def markdown(table: Table) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(" ".join(str(c).replace("|", "\\|").split()) for c in cells) + " |"

    lines = [f"**{table.title}**", "", line(table.columns), line(["---"] * len(table.columns)), *map(line, table.rows)]
    lines += ["", table.note] if table.note else []
    lines += ["", *(f"- {origin}" for origin in table.origins)] if table.origins else []
    return "\n".join(lines) + "\n"


def as_csv(table: Table) -> str:
    """Writes numbers as they are, not rounded; a column with intervals is three: X, "X low", "X high"."""
    wide = [any(isinstance(c, Figure) and c.low is not None for c in column) for column in zip(*table.rows)]
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    names = [[n, f"{n} low", f"{n} high"] if three else [n] for n, three in zip(table.columns, wide)]
    write([name for three in names for name in three])
    for row in table.rows:
        cells: list[Any] = []
        for cell, three in zip(row, wide):
            value, low, high = (cell.value, cell.low, cell.high) if isinstance(cell, Figure) else (cell, "", "")
            cells += [value, low, high] if three else [value]
        write(cells)
    return text.getvalue()


def as_html(table: Table) -> str:
    """Writes a table without its origins: the page has them once for all tables."""

    def line(tag: str, cells: Iterable[Any]) -> str:
        kinds = [' class="figure"' if isinstance(c, Figure | int) else "" for c in cells]
        return "<tr>" + "".join(f"<{tag}{k}>{html.escape(str(c))}</{tag}>" for c, k in zip(cells, kinds)) + "</tr>"

    head, body = line("th", table.columns), "\n".join(line("td", row) for row in table.rows)
    return (
        f"<h3>{html.escape(table.title)}</h3>\n"
        f'<div class="table"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n'
        f'<p class="note">{html.escape(table.note)}</p>\n'
    )
