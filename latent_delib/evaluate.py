"""Perplexity of the n-th token ahead, with latents after every token and without (Section 3.1, Table 1).

  python -m latent_delib.evaluate --config=configs/X.py --workdir=DIR [--out=DIR] [--step=N] [--distributed]

Writes perplexity.json and perplexity.png to --out (the workdir by default) and prints the table. Both folders may be
gs://BUCKET/PATH.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from latent_delib import checkpoint, commands, distributed, experiment
from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.errors import UserError
from latent_delib.experiment import Experiment
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.transformer import Params
from latent_delib.progress import Progress
from latent_delib.step import ahead_step, read_step
from latent_delib.weights import folder


class Sums(NamedTuple):
    """For n = 1 ... A: Σ -log p under the decoder and with latents, in nats, and Σ tokens; float64 [A] each."""

    decoder: np.ndarray
    augmented: np.ndarray
    tokens: np.ndarray


def main(flags: Any) -> None:
    with distributed.job(flags):
        evaluate(flags.config, flags.workdir, flags.out or flags.workdir, flags.step)


def evaluate(config: ConfigDict, workdir: str, out: str, step: int | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint of `workdir` on the config's validation sources; returns what perplexity.json holds.

    Method "decoder" on a decoder with weights needs no checkpoint: it is the frozen decoder. Of several processes each
    reads all of the text and computes its share of it, and all return the same.

    Raises:
      UserError: no checkpoint, one of another decoder or method, bad config or data.
    """
    exp = experiment.read(config)
    plain = json.loads(config.to_json_best_effort())
    distributed.check_same(config=json.dumps([plain, workdir, step]), decoder=exp.fingerprint)
    untrained = config.method.name == "decoder" and bool(config.decoder.path)
    if untrained and not (epath.Path(workdir) / "checkpoints").is_dir():
        params, found = {"decoder": experiment.load_decoder(exp, exp.dtype)}, None
    else:
        params, found = load(exp, workdir, step)
    pieces = read_pieces(exp)
    distributed.check_same(validation=hashlib.sha256(np.concatenate(pieces)).hexdigest())
    rows = table(perplexity(exp, params, pieces))
    result = {
        "rows": rows,
        "pieces": len(pieces),
        "config": plain,
        "checkpoint": None if found is None else str(epath.Path(workdir) / "checkpoints" / str(found)),
        "fingerprint": exp.fingerprint,
    }
    if jax.process_index() == 0:
        write(result, epath.Path(out))
        print(show(rows, result), flush=True)
    return result


def load(exp: Experiment, workdir: str, step: int | None) -> tuple[Params, int]:
    """The parameters of a checkpoint, in the config's dtype, and its step."""
    shapes = folder.shapes(exp.aug.transformer.config)
    shapes = jax.eval_shape(experiment.init_trainable(exp), jax.random.key(0), shapes)
    shardings = mesh_lib.parameters(exp.mesh, shapes, PARAM_AXES, mesh_lib.TRAINABLE)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    checkpoints, *_ = checkpoint.open_for_reading(workdir, step)
    found = checkpoints.restore_newest(wanted, step=step, check=lambda meta: exp.check_same(meta, workdir))
    checkpoints.close()
    decoder = experiment.load_decoder(exp, exp.dtype)
    return {"decoder": decoder} | jax.tree.map(lambda x: x.astype(exp.dtype), found.trainable), found.step


def read_pieces(exp: Experiment) -> list[np.ndarray]:
    """The validation text: every document, cut where longer than `max_length` into pieces that each begin with BOS.

    With `max_pieces`, that many of each source, evenly spread over it: a quick look.
    """
    e, by_source = exp.config.evaluate, {source: [] for source in exp.config.data.validation}
    for source, tokens in batches.validation_documents(exp.config.data, tokenizer_path=str(exp.tokenizer.path)):
        by_source[source] += [p for p in batches.pieces(tokens, e.max_length, exp.tokenizer.bos_id) if len(p) > 1]
    chosen: list[np.ndarray] = []
    for pieces in by_source.values():
        wanted = min(e.max_pieces or len(pieces), len(pieces))
        chosen += [pieces[i * len(pieces) // wanted] for i in range(wanted)]
    if not chosen:
        raise UserError(f"config.data.validation={exp.config.data.validation}: holds no text")
    return chosen


def perplexity(exp: Experiment, params: Params, pieces: Sequence[np.ndarray]) -> Sums:
    """Sums over every token of every piece (int32 [n], BOS first), each counted once for each n that reaches it.

    A piece is read once; its cache then serves all its positions, `positions` of them at a time, which bounds the
    memory. No sum depends on how pieces are batched, or on the number of hosts: every host gets each token's value and
    adds up all of them, in float64.
    """
    e, pad = exp.config.evaluate, exp.tokenizer.pad_id
    pieces = sorted(pieces, key=len)  # alike in length together: least padding
    A, B, M, T = e.num_ahead, e.batch_size, min(e.positions, e.max_length), e.max_length
    aug, whole = exp.aug, mesh_lib.replicated(exp.mesh)
    if B % (shards := mesh_lib.row_shards(exp.mesh)):
        raise UserError(f"config.evaluate.batch_size={B} does not split over {shards} devices")
    here = mesh_lib.local_rows(exp.mesh, B)
    read = jax.jit(partial(read_step, aug=aug, dtype=exp.dtype), out_shardings=(None, whole))
    ahead = jax.jit(partial(ahead_step, aug=aug, num_ahead=A), out_shardings=whole)

    def place(x: np.ndarray) -> jax.Array:
        return mesh_lib.place_rows(exp.mesh, x[here], B)

    sums = Sums(*np.zeros((3, A)))
    done, progress = 0, Progress("evaluated", sum(map(len, pieces)), "tokens")
    for first in range(0, len(pieces), B):
        rows = pieces[first : first + B]
        tokens, segment = np.full((B, T), pad, np.int32), np.zeros((B, T), np.int32)
        for i, piece in enumerate(rows):
            tokens[i, : len(piece)], segment[i, : len(piece)] = piece, 1
        tokens_BT, segment_BT = place(tokens), place(segment)
        cache, text_nll = read(params, tokens_BT, segment_BT)
        longest, parts = max(map(len, rows)) - 1, []  # positions with at least one ahead token
        for start in range(0, longest if aug.has_latents else 0, M):
            at_BM = np.minimum(np.arange(start, start + M), T - 1)  # T - 1 has no ahead tokens, so no weight
            at_BM = place(np.tile(at_BM, (B, 1)).astype(np.int32))
            parts.append(ahead(params, cache, tokens_BT, segment_BT, at_BM))
        # Read only now that the device has all it needs to go on.
        for nll_T, piece in zip(np.asarray(text_nll, np.float64), rows):
            for n in range(1, min(A, len(piece) - 1) + 1):
                sums.decoder[n - 1] += nll_T[n - 1 : len(piece) - 1].sum()
                sums.tokens[n - 1] += len(piece) - n
        for nll, weights in parts:
            sums.augmented[:] += (np.asarray(nll, np.float64) * np.asarray(weights)).sum(axis=(0, 1))
        done += sum(map(len, rows))
        if jax.process_index() == 0:
            progress(done)
    return sums if aug.has_latents else sums._replace(augmented=sums.decoder)


def table(sums: Sums) -> list[dict[str, float]]:
    """One row for each n that some document reaches."""
    rows = []
    for n, (decoder, augmented, tokens) in enumerate(zip(*sums), start=1):
        if tokens:
            plain, ours = float(np.exp(decoder / tokens)), float(np.exp(augmented / tokens))
            change = 100 * float(np.expm1((augmented - decoder) / tokens))
            rows.append(
                {"n": n, "tokens": int(tokens), "decoder_ppl": plain, "augmented_ppl": ours, "change_percent": change}
            )
    return rows


def show(rows: Sequence[dict[str, float]], result: dict[str, Any]) -> str:
    """The table in plain text: n = 1, 2, 4, 8, ..."""
    method = result["config"]["method"]
    lines = [
        f"perplexity of the n-th token ahead; {method['name']}, {method['num_latents']} latents, "
        f"placement {method['placement']}, {result['pieces']} pieces of text",
        f"{'n':>3} {'tokens':>10} {'decoder':>10} {'augmented':>10} {'change':>9}",
    ]
    for row in rows:
        if row["n"] & (row["n"] - 1) == 0:
            lines.append(
                f"{row['n']:>3} {row['tokens']:>10,} {row['decoder_ppl']:>10.4f} {row['augmented_ppl']:>10.4f} "
                f"{row['change_percent']:>+8.2f}%"
            )
    return "\n".join(lines)


def write(result: dict[str, Any], out: epath.Path) -> None:
    """perplexity.json and perplexity.png, each under its name only once whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.axhline(0, color="black", linewidth=0.8, label="frozen decoder")
    axes.plot([r["n"] for r in rows], [r["change_percent"] for r in rows], marker="o", markersize=3, label="augmented")
    axes.set(xlabel="n-th token ahead", ylabel="change in perplexity (%)")
    axes.legend()
    figure.savefig(png := io.BytesIO(), format="png", dpi=150)
    pyplot.close(figure)
    for name, content in (
        ("perplexity.png", png.getvalue()),
        ("perplexity.json", f"{json.dumps(result, indent=2)}\n".encode()),
    ):
        (out / f".{name}.tmp").write_bytes(content)
        (out / f".{name}.tmp").replace(out / name)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        config=(commands.CONFIG, "a file under configs/"),
        workdir=(commands.REQUIRED, "of a training job"),
        out=("", "where to write; the workdir if left out"),
        step=(None, "checkpoint step; the newest if left out"),
        **distributed.FLAGS,
    )
