"""An evaluation as plain text, as `evaluate` prints it."""

from typing import Any

from latent_delib.job.words import settings_in_words, writes_latents
from latent_delib.machine.columns import aligned
from latent_delib.measure import metric
from latent_delib.results.entries import controls_in_words
from latent_delib.results.figures import CURVES
from latent_delib.results.tables import changes

# Units -> percent of cases in which a 95 % interval over so few holds: works of equal size, normal
# changes, simulated by tests/measure/test_intervals.py.
HOLDS = {2: 47, 3: 75, 4: 88}


def as_text(result: dict[str, Any]) -> str:
    """Returns the tables as plain text: of each source and its works, then of all text."""
    sets = result["sets"]
    lines = [_heading(result)]
    for source, found in sets.items():
        if len(sets) > 1:
            lines.append(f"{source}, {_documents(found)}")
        lines.append(_table(found))
        lines += _works(found["works"])
    if len(sets) > 1:
        lines += ["all", _table(result)]
    return "\n".join(lines)


def _heading(result: dict[str, Any]) -> str:
    """Says which method was evaluated, how, and on how much text."""
    method = result["config"]["method"]
    words = [method["name"]]
    if result["step"] is not None:
        words.append(f"step {result['step']}")
    if writes_latents(method["name"]):
        words.append(f"{method['num_latents']} latents")
    words += settings_in_words(method)
    if method.get("distill") and not method.get("visible_text"):
        words.append("without the steps")
    words += controls_in_words(result["config"]["evaluate"])
    words.append(f"{result['pieces']} pieces of {_documents(result)}")
    return f"perplexity of the n-th token ahead; {', '.join(words)}"


def _documents(part: dict[str, Any]) -> str:
    """Says how many documents there are, and of how many works unless each is its own work."""
    counts = {"works": f" of {part['num_works']} works", "documents of one work": " of one work"}
    of_works = counts.get(part["interval_over"], "")
    count = part["documents"]
    plural = "" if count == 1 else "s"
    return f"{count} document{plural}{of_works}"


def _drawn(part: dict[str, Any]) -> str:
    """Names the units that intervals draw; where they are few, also how often an interval holds."""
    over = part["interval_over"]
    count = part["num_works"] if over == "works" else part["documents"]
    if count not in HOLDS:
        return over
    return f"{over} (only {count}: it holds in {HOLDS[count]} % of cases)"


def _works(works: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a line for each of several works: its change at a few n."""
    if len(works) < 2:
        return []
    deepest = max(len(part["rows"]) for part in works.values())
    names = ["by work, intervals over its documents"]
    names += [f"n = {n}" for n in CURVES if n <= deepest]
    lines = [names]
    for name, part in works.items():
        cells = [f"{name}, {_documents(part | {'interval_over': None})}"]
        known = changes(part)
        for column in names[1:]:
            cells.append(str(known.get(column, "")))
        lines.append(cells)
    return [f"  {line}" for line in aligned(lines, left=names)]


def _table(part: dict[str, Any]) -> str:
    """Returns a part of perplexity.json as plain text: n = 1, 2, 4, ..., and the mean over every n.

    Metrics other than perplexity follow the interval, without latents and with them.
    """
    rows = part["rows"]
    interval = f"95 % interval over {_drawn(part)}"
    head = f"{'n':>4} {'tokens':>10} {'decoder':>10} {'augmented':>10} {'change':>9}   {interval}"
    others = []
    for each in metric.METRICS:
        is_measured = all(f"decoder_{each.name}" in row for row in rows)
        if is_measured and each is not metric.PERPLEXITY:
            others.append(each.name)
    lines = ["; ".join([head, *others])]
    for row in rows:
        is_power_of_two = row["n"] & (row["n"] - 1) == 0
        if not is_power_of_two:
            continue
        line = (
            f"{row['n']:>4} {row['tokens']:>10,} "
            f"{row['decoder_ppl']:>10.4f} {row['augmented_ppl']:>10.4f} {_change(row)}"
        )
        more = [f"{row[f'decoder_{name}']:.4g} {row[f'augmented_{name}']:.4g}" for name in others]
        lines.append("; ".join([line, *more]))
    if part.get("mean"):  # older files have none
        lines.append(f"{'mean':<38}{_change(part['mean'])}")
    return "\n".join(lines)


def _change(row: dict[str, Any]) -> str:
    """Returns a change and its interval, in two columns."""
    interval = "one alone"
    if row["change_low"] is not None:
        interval = f"[{row['change_low']:+.2f}, {row['change_high']:+.2f}]"
    return f"{row['change_percent']:>+8.2f}%   {interval}"
