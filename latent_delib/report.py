"""From finished runs to tables, pictures and one page: ours beside the published figures (Liu et al. 2025).

  python -m latent_delib.report DIR [DIR ...] --out=DIR [--against=RUN] [--look=WORKDIR [--text=TEXT]]

Reads every perplexity.json, benchmarks.json and metrics.jsonl below the folders. Writes to --out, a local folder or
gs://BUCKET/PATH: report.html (one file that needs no other), each table as .md, .csv and .png, each figure as .png.
--against adds a table of all runs compared with one of them, document by document.
--look adds what the latents of a checkpoint attend to, what attends to them, and the words they lie near.
The same runs give the same files, byte for byte.
"""

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from latent_delib.delib.coprocessor import Inserted
from latent_delib.errors import UserError
from latent_delib.lm import load, look
from latent_delib.lm import model as lm
from latent_delib.machine import checkpoint, commands, files
from latent_delib.machine.progress import Progress
from latent_delib.measure import perplexity
from latent_delib.results import figures, published, runs, tables
from latent_delib.results.tables import Figure, Table

LONGEST = 512  # tokens of --text: the pictures have a column for each
AHEAD = 12  # of the text, the last tokens that --look reads after the latents
TEXT = (
    "Tom had four apples and gave one of them to his sister. His mother then bought six more at the market, and put "
    "all of them on the kitchen table. When Tom came home he counted the apples that were there, and"
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fdfdfb; --soft: #6a6a6a; --rule: #d8d8d2;
  --stripe: #f3f3ee }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --paper: #17181a; --soft: #a0a09a; --rule: #3a3b3e; --stripe: #202225 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 2rem 1rem; max-width: 72rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { margin-top: 3rem; border-bottom: 1px solid var(--rule) }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .6rem }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top }
th { border-bottom-width: 2px; white-space: nowrap } td.figure { white-space: nowrap; text-align: right }
tbody tr:nth-child(even) { background: var(--stripe) }
.note { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere }
figure { margin: 2rem 0 } figcaption { font-weight: 600 }
img { max-width: 100%; background: #fff; border-radius: 6px; margin-top: .5rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--stripe); padding: .7rem; border-radius: 6px }
"""


class Look(NamedTuple):
    """What --look found. words: a paragraph. pictures: (file name without suffix, caption, PNG)."""

    words: str
    nearest: Table
    pictures: list[tuple[str, str, bytes]]


def main(flags: Any) -> None:
    if os.path.isfile(flags.out):
        raise UserError(f"--out={flags.out}: is a file, expected a folder")
    found = runs.find(flags.folders)
    beside = [compare(found, flags.against)] if flags.against else []
    seen = look_into(flags.look, flags.text) if flags.look else None
    report(found, epath.Path(flags.out), beside, seen)


def report(found: runs.Runs, out: epath.Path, beside: Sequence[Table] = (), seen: Look | None = None) -> None:
    """Writes everything, and the tables `beside` it, each file under its name only once whole; report.html last."""
    every = [*tables.tables(found), *beside]
    drawn: list[tuple[str, Callable[[], bytes]]] = [(t.name, lambda t=t: figures.table(t)) for t in every]
    curves = list(figures.curves(found))
    drawn += [(name, draw) for name, _, draw in curves]
    pngs, progress = {}, Progress("drew", len(drawn), "pictures")
    out.mkdir(parents=True, exist_ok=True)
    for done, (name, draw) in enumerate(drawn, 1):
        pngs[name] = draw()
        files.write(out / f"{name}.png", pngs[name])
        progress(done)
    for table in [*every, *([seen.nearest] if seen else [])]:
        files.write(out / f"{table.name}.md", tables.markdown(table).encode())
        files.write(out / f"{table.name}.csv", tables.as_csv(table).encode())
    for name, _, png in seen.pictures if seen else []:
        files.write(out / f"{name}.png", png)
    files.write(out / "report.html", page(every, [(c, pngs[name]) for name, c, _ in curves], seen).encode())
    counts = len(found.perplexity), len(found.benchmarks), len(found.losses)
    print("read {} perplexity.json, {} benchmarks.json, {} metrics.jsonl".format(*counts))
    print(f"wrote {out / 'report.html'}, and {len(every)} tables and {len(curves)} figures beside it", flush=True)


def page(every: list[Table], curves: list[tuple[str, bytes]], seen: Look | None) -> str:
    """Makes the report as one HTML file: pictures inside it, no scripts, nothing to load."""

    def picture(caption: str, png: bytes) -> str:
        data = base64.b64encode(png).decode()
        return (
            f"<figure><figcaption>{html.escape(caption)}</figcaption>"
            f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></figure>'
        )

    all_runs, *eight = map(tables.as_html, every)
    parts = [
        "<h1>Deliberation in latent space: runs of latent_delib</h1>",
        "<p>Ours beside the figures of <em>Deliberation in Latent Space via Differentiable Cache Augmentation</em> "
        f"(Liu et al. 2025), which are on {html.escape(published.DECODER)}. A table that none of these runs is about "
        "holds the published lines.</p>",
    ]
    origins = "".join(f"<li>{html.escape(origin)}</li>" for origin in every[0].origins)
    parts += ["<h2>What was run</h2>", all_runs, f'<ul class="note">{origins}</ul>']
    parts += ["<h2>Curves</h2>", *(picture(*curve) for curve in curves)] if curves else []
    parts += ["<h2>Tables</h2>", *eight]
    if seen:
        parts += ["<h2>A look into latents</h2>", f"<pre>{html.escape(seen.words)}</pre>", tables.as_html(seen.nearest)]
        parts += [picture(caption, png) for _, caption, png in seen.pictures]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>latent_delib: report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def compare(found: runs.Runs, against: str) -> Table:
    """Compares all runs on the same text with one, by the sums of documents.npz: the change in perplexity of the n-th
    token ahead. What is hard for both cancels, so this tells more than two intervals side by side. Intervals draw works
    where one of the two files says which document is of which. Where the frozen decoder has other figures, a warning
    says so and that run is left out.

    Raises:
      UserError: `against` holds no documents.npz.
    """
    if (base := _documents(epath.Path(against))) is None:
        raise UserError(f"--against={against}: holds no documents.npz, which `evaluate` writes")
    rows, used, others = [], [], []
    over: dict[str, str | None] = {}
    for result in found.perplexity:
        read = _documents(epath.Path(result.path).parent)
        if read is None:
            continue
        ours, there = read.sums, base.sums
        A = min(ours.tokens.shape[1], there.tokens.shape[1])  # what both were asked for
        ours, there = (perplexity.Sums(*(x[:, :A] for x in sums)) for sums in (ours, there))
        if not np.array_equal(ours.tokens, there.tokens):
            continue  # another text
        if not np.allclose(ours.decoder, there.decoder):
            others.append(str(result.path.parent))
            continue
        pair = perplexity.Sums(there.tokens, there.augmented, ours.augmented)
        work = base.work if read.work is None else read.work
        over[result.key] = None if work is None else perplexity.over(work)
        if work is None:
            work = np.arange(len(pair.tokens))
        by_n = {row["n"]: row for row in perplexity.table(pair, work, seed=0)}
        cells = [tables.change(by_n[n]) if n in by_n else "" for n in tables.AHEAD]
        rows.append([tables.of(result).latents, tables.label(tables.of(result)), result.key, *cells])
        used.append(result)
    if others:
        checkpoint.warn(f"--against={against}: the frozen decoder has other figures in {', '.join(others)}: left out")
    columns = ["latents", "what", "from", *(f"n = {n}" for n in tables.AHEAD)]
    title = f"Change in perplexity of the n-th token ahead against {against}"
    return tables.finished("12_against", title, columns, rows, used, over)


class Documents(NamedTuple):
    """A documents.npz. work: the work each document is of; None: an older file, which does not say."""

    sums: perplexity.Sums
    work: np.ndarray | None


def _documents(folder: epath.Path) -> Documents | None:
    """Reads the documents.npz of a folder, if it has one."""
    file = folder / "documents.npz"
    if not file.exists():
        return None
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
        sums = perplexity.Sums(*(found[name] for name in perplexity.Sums._fields))
        return Documents(sums, found["work"] if "work" in found else None)


def look_into(workdir: str, text: str) -> Look:
    """Looks into latents of the newest checkpoint of `workdir`, in front of the last AHEAD tokens of a text.

    Raises:
      UserError: no such checkpoint, one without latents or without a decoder on disk, a text that is too short or long.
    """
    if not (epath.Path(workdir) / "checkpoints").is_dir():
        raise UserError(f"--look={workdir}: holds no checkpoints; train it first")
    checkpoints, _, meta = checkpoint.open_for_reading(workdir, None)
    checkpoints.close()
    model = lm.AugmentedLM(
        load.load_decoder(load.decoder_of(workdir, load.Record.from_meta(meta, workdir))),
        load.load_coprocessor(workdir),
    )
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    if len(tokens) < AHEAD + 2:
        raise UserError(f"--text={text!r}: {len(tokens)} tokens with BOS, expected at least {AHEAD + 2}")
    if len(tokens) > LONGEST:
        raise UserError(f"--text: {len(tokens):,} tokens with BOS, expected at most {LONGEST}")
    at = len(tokens) - 1 - AHEAD
    step = model.coprocessor.step
    before, after = model.tokenizer.decode(tokens[: at + 1]), model.tokenizer.decode(tokens[at + 1 :])

    z_BMLD = model.latents([tokens], [[at]])
    if isinstance(z_BMLD, Inserted):
        raise UserError(f"--look={workdir}: method {meta['method.name']!r} writes keys and values, no vectors")
    rows = [
        [f"z{i + 1}", *(cell for near in row for cell in (near.word, Figure(near.cosine)))]
        for i, row in enumerate(look.nearest(model, z_BMLD[0, 0]))
    ]
    columns = ["latent", *(name for i in range(1, len(rows[0]) // 2 + 1) for name in (f"nearest {i}", f"cosine {i}"))]
    note = f"Cosine with the rows of the decoder's token table. Checkpoint: {workdir}, step {step}."
    written, decoded = look.attention(model, tokens, at)
    pictures = []
    if written:
        title = "What latents attend to: the coprocessor's call"
        pictures.append(("look_coprocessor", title, figures.attention(written, title)))
    title = "What latents and the tokens after them attend to: the decoder's call"
    pictures.append(("look_decoder", title, figures.attention(decoded, title)))
    return Look(
        f"{before} [{len(rows)} latents] {after}",
        Table("look_nearest", "Words whose embeddings lie nearest to each latent", columns, rows, note, []),
        pictures,
    )


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        folders=(commands.FOLDERS, "folders of finished runs, with all that lies below them"),
        out=(commands.REQUIRED, "where to write"),
        against=("", "a folder with documents.npz, that of the run to compare with"),
        look=("", "a workdir whose latents are looked into"),
        text=(TEXT, "what they are looked at in"),
    )
