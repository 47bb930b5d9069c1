"""Makes tables and figures from finished runs: ours beside the published ones (Liu et al. 2025).

  python -m latent_delib.report DIR [DIR ...] --out=DIR [--against=RUN]
      [--look=WORKDIR [--text=TEXT]]

Reads every perplexity.json, benchmarks.json and metrics.jsonl below the folders, packed ones
(docs/results) too. Writes to --out, a local folder or gs://BUCKET/PATH: report.md, all tables and
figures on one page; each table as .md and .csv; each figure as .png. --against adds a table of all
runs compared with one of them, work by work. --look adds what the latents of a checkpoint attend
to, what attends to them, and the words nearest to them. The same runs give the same files, byte for
byte.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from latent_delib.delib.coprocessor import Inserted
from latent_delib.errors import UserError
from latent_delib.lm import load, look
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine import commands, files
from latent_delib.machine.command_line import FOLDERS, REQUIRED
from latent_delib.results import costs, figures, published, runs, tables
from latent_delib.results.against import compare
from latent_delib.results.figures import Picture
from latent_delib.results.table_format import Figure, Table, as_csv, markdown

LONGEST = 512  # tokens of --text: the pictures have a column for each
AHEAD = 12  # last tokens of --text, which --look reads after the latents
TEXT = (
    "Tom had four apples and gave one of them to his sister. "
    "His mother then bought six more at the market, and put all of them on the kitchen table. "
    "When Tom came home he counted the apples that were there, and"
)


class Look(NamedTuple):
    """Holds the findings of --look.

    words: the text, with the place of the latents.
    nearest: the words nearest to each latent.
    pictures: attention maps.
    """

    words: str
    nearest: Table
    pictures: list[Picture]


def main(flags: Any) -> None:
    files.check_writable(flags.out)
    if flags.text != TEXT and not flags.look:
        raise UserError("--text needs --look=WORKDIR")
    figures.pyplot()  # refuses before any work where matplotlib is not installed
    found = runs.find(flags.folders)
    every = [*tables.tables(found), costs.table(found)]
    if flags.against:
        every.append(compare(found, flags.against))
    seen = look_into(flags.look, flags.text) if flags.look else None
    curves = figures.curves(found)
    write_report(every, curves, seen, epath.Path(flags.out))
    counts = len(found.perplexity), len(found.benchmarks), len(found.losses)
    print("read {} perplexity.json, {} benchmarks.json, {} metrics.jsonl".format(*counts))
    print(
        f"wrote {flags.out}/report.md, and {len(every)} tables and {len(curves)} figures beside it",
        flush=True,
    )


def write_report(
    every: Sequence[Table], curves: Sequence[Picture], seen: Look | None, out: epath.Path
) -> None:
    """Writes each table and each picture, and report.md last."""
    written = [*every, seen.nearest] if seen else every
    pictures = [*curves, *seen.pictures] if seen else curves
    for table in written:
        files.write(out / f"{table.name}.md", markdown(table).encode())
        files.write(out / f"{table.name}.csv", as_csv(table).encode())
    for picture in pictures:
        files.write(out / f"{picture.name}.png", picture.png)
    files.write(out / "report.md", page(every, curves, seen).encode())


def page(every: Sequence[Table], curves: Sequence[Picture], seen: Look | None) -> str:
    """Returns the report as one page of Markdown, with links to the pictures beside it."""
    all_runs, *others = every
    parts = [
        "# Deliberation in latent space: runs of latent_delib",
        "Ours beside the figures of *Deliberation in Latent Space via Differentiable Cache "
        f"Augmentation* (Liu et al. 2025), which are on {published.DECODER}. "
        "A table to which none of these runs belongs shows the published lines alone.",
        "## What was run",
        markdown(all_runs),
    ]
    if curves:
        parts += ["## Curves", *map(_link, curves)]
    parts.append("## Tables")
    for table in others:
        parts.append(markdown(table._replace(origins=[])))  # the first table has them all
    if seen:
        quoted = seen.words.replace("\n", "\n    ")
        parts += [
            "## A look into latents",
            f"    {quoted}",
            markdown(seen.nearest),
            *map(_link, seen.pictures),
        ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _link(picture: Picture) -> str:
    return f"**{picture.caption}**\n\n![{picture.caption}]({picture.name}.png)"


def look_into(workdir: str, text: str) -> Look:
    """Inspects latents that are written before the last AHEAD tokens of a text.

    They are written by a workdir's newest checkpoint, or by an export.

    Raises:
      UserError: there is no such checkpoint; its method writes no latents, or keys and values;
        its decoder is not on disk; or the text is too short or too long.
    """
    coprocessor = load.load_coprocessor(workdir)
    decoder = load.load_decoder(load.decoder_of(workdir, coprocessor.record))
    model = AugmentedLM(decoder, coprocessor)
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    if len(tokens) < AHEAD + 2:
        raise UserError(
            f"--text={text!r}: {len(tokens)} tokens with BOS, expected at least {AHEAD + 2}"
        )
    if len(tokens) > LONGEST:
        raise UserError(f"--text: {len(tokens):,} tokens with BOS, expected at most {LONGEST}")
    at = len(tokens) - 1 - AHEAD
    z_BMLD = model.latents([tokens], [[at]])
    if isinstance(z_BMLD, Inserted):
        method = model.coprocessor.method
        raise UserError(f"--look={workdir}: method {method!r} writes keys and values, not vectors")
    z_LD = z_BMLD[0, 0]
    before = model.tokenizer.decode(tokens[: at + 1])
    after = model.tokenizer.decode(tokens[at + 1 :])
    words = f"{before} [{len(z_LD)} latents] {after}"
    note = (
        "Cosine with the rows of the decoder's token table. "
        f"Checkpoint: {workdir}, step {model.coprocessor.step}."
    )
    nearest = _nearest(look.nearest(model, z_LD), note)
    return Look(words, nearest, _attention(*look.attention(model, tokens, at)))


def _nearest(by_latent: Sequence[Sequence[look.Near]], note: str) -> Table:
    """Makes the table of the words nearest to each latent."""
    columns = ["latent"]
    for number in range(1, len(by_latent[0]) + 1):
        columns += [f"nearest {number}", f"cosine {number}"]
    rows = []
    for number, words in enumerate(by_latent, 1):
        row: list = [f"z{number}"]
        for near in words:
            row += [near.word, Figure(near.cosine)]
        rows.append(row)
    title = "Words whose embeddings are nearest to each latent"
    return Table("look_nearest", title, columns, rows, note, [])


def _attention(written: look.AttentionMap | None, decoded: look.AttentionMap) -> list[Picture]:
    """Draws the attention of the decoder's call, and of the coprocessor's where there is one."""
    pictures = []
    if written:
        title = "What latents attend to: the coprocessor's call"
        pictures.append(_picture("look_coprocessor", title, written))
    title = "What latents and the tokens after them attend to: the decoder's call"
    pictures.append(_picture("look_decoder", title, decoded))
    return pictures


def _picture(name: str, title: str, seen: look.AttentionMap) -> Picture:
    weights_LSU = seen.weights.mean(axis=1)
    png = figures.attention(weights_LSU, seen.rows, seen.columns, seen.text, title)
    return Picture(name, title, png)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        folders=(FOLDERS, "folders of finished runs, with all that lies below them"),
        out=(REQUIRED, "where to write"),
        against=("", "the folder of a run to compare with; it holds documents.npz"),
        look=("", "a workdir, or an export, whose latents are inspected"),
        text=(TEXT, "text for --look, which writes latents before its last 12 tokens"),
    )
