"""Proves a chip and measures it, in at most 8 minutes: the first command on a GPU or TPU.

  ./launch/gpu.sh .venv/bin/python -m benchmarks.chip     on a GPU; on a TPU without gpu.sh
  python -m benchmarks.chip --small                       in small: the default on a CPU, a minute
  python -m benchmarks.chip --table docs/results/chip     a folder's results, a table in Markdown

Its parts, in this order; each has a share of the time:

  proof   every form of attention against the reference, forward and gradients;
          a training step against one in float32
  steps   matrix products and copies at their fastest;
          training steps of Gemma 2 2B in the published setting
  peer    the same steps by PyTorch, where torch is installed
  use     evaluation and decoding

Rows lie in runs/chip/CHIP.json as soon as they are there. What does not fit the time is left out
and said; the same command again makes what is missing or failed, and the whole proof where the
kernels have changed. A kernel whose rows all agree is recorded on this machine: `auto` takes it
from then on. The exit code is 1 where a form does not agree.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import chip_parts, common
from latent_delib.machine.columns import markdown
from latent_delib.nn.attention import choice

SHARES = {"proof": 0.5, "steps": 0.25, "peer": 0.15, "use": 0.1}
GRACE = 20  # seconds that a part may take beyond its own, for the row that it is at
FIRST = 180  # seconds within which jax must find its device
LEAST = 15  # seconds below which no part is begun
# What must be the same for rows to stand in one file.
SAME = ("device", "driver", "jax", "jaxlib", "xla_flags", "kernels", "torch", "small")
# launch/gpu.sh sets this flag. With it, XLA converts the whole token table for every token that is
# decoded at batch 1, so part `use` runs without it.
NEEDED = "--xla_gpu_enable_triton_gemm=false"
FOLDER = Path("runs/chip")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.command_line(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny models; proves nothing")
    parser.add_argument("--out", type=Path, help=f"by default {FOLDER}/CHIP.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FOLDER",
        help="print the table of these results, and that is all",
    )
    a = parser.parse_args(argv)
    if a.table:
        print(table(stored(a.table)))
        return 0
    until = time.monotonic() + 60 * a.minutes - GRACE
    out = start(a.small, a.out)
    if chip_parts.read(out)["about"]["platform"] != "cpu":
        # A program is compiled once for all processes, and for the next call of this command.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((FOLDER / "compiled").absolute()))
    for part in SHARES:
        run(part, out, until)
        if part == "proof":
            print(record(chip_parts.read(out)), flush=True)
    result = chip_parts.read(out)
    print(f"\n{summary(result)}\n\n{table([result])}\n\n{out}")
    return 1 if disagreeing(result) else 0


def start(small: bool, out: Path | None) -> Path:
    """Asks what the chip is, in a process that ends, and makes the file of results or finds it."""
    command = [sys.executable, "-m", "benchmarks.chip_parts", "--part=about", *["--small"] * small]
    try:
        asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=FIRST)
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"error: jax found no device within {FIRST} s; is another process using it?"
        ) from None
    if asked.returncode:
        raise SystemExit("error: jax finds no device that works: the lines above say why")
    about = json.loads(asked.stdout.splitlines()[-1])
    name = re.sub(r"\W+", "_", about["device"]).strip("_").lower()
    out = out or FOLDER / f"{name}{'_small' * about['small']}.json"
    versions = f"driver {about['driver']}, jax {about['jax']}"
    print(f"{about['device']} ({about['family']}), {versions}: {out}", flush=True)
    if about["platform"] == "cpu" and not small:
        if NEEDED in about["xla_flags"] or about["plugins"]:
            raise SystemExit(
                "error: jax opens no GPU or TPU here: the lines above say why; --small needs none"
            )
        print("jax sees no GPU or TPU here: in small, which proves nothing", flush=True)
    # Without this flag XLA cannot compile the reference.
    if about["platform"] == "gpu" and NEEDED not in about["xla_flags"]:
        raise SystemExit(
            f"error: XLA_FLAGS lack {NEEDED}: "
            "expected ./launch/gpu.sh .venv/bin/python -m benchmarks.chip"
        )
    if not out.exists():
        chip_parts.write(out, {"about": about, "parts": {}})
    before = chip_parts.read(out)["about"]
    for key in SAME:
        was, now = before[key], about[key]
        if was != now:
            raise SystemExit(
                f"error: {out}: made with {key} {was!r}, now {now!r}; name another --out"
            )
    forget(out, about)
    return out


def forget(out: Path, about: dict[str, Any]) -> None:
    """Removes the rows that failed, so that they are made again; all of the proof of other code.

    A row that ended its process three times gets three more tries.
    """
    result = chip_parts.read(out)
    for name, part in result["parts"].items():
        is_old = name == "proof" and result["about"].get("code") != about["code"]
        gone = [row for row, made in part["rows"].items() if is_old or "failed" in made]
        for row in gone:
            del part["rows"][row]
        if gone:
            part.pop("left_out", None)
    result["about"]["code"] = about["code"]
    chip_parts.write(out, result)


def run(part: str, out: Path, until: float) -> None:
    """Runs a part in processes of its own, within its share of the time that is left."""
    result = chip_parts.read(out)
    later = list(SHARES)[list(SHARES).index(part) :]
    to_do = {p: SHARES[p] for p in later if not is_complete(result, p)}
    if part not in to_do:
        return
    began = time.monotonic()
    ends = began + (until - began) * to_do[part] / sum(to_do.values())
    environment = dict(os.environ)
    if part == "use":
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(NEEDED, "")
    gets_on = True
    while gets_on:
        seconds = ends - time.monotonic()
        if seconds < LEAST:
            return
        before = out.read_bytes()
        command = [sys.executable, "-m", "benchmarks.chip_parts", f"--part={part}", f"--out={out}"]
        command += [f"--seconds={seconds:.1f}", *["--small"] * result["about"]["small"]]
        try:
            code = subprocess.run(command, timeout=seconds + GRACE, env=environment).returncode
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, out of time", flush=True)
            return
        if code == 0:
            return
        print(f"{part}: its process ended with code {code}", flush=True)
        gets_on = out.read_bytes() != before


def is_complete(result: dict[str, Any], part: str) -> bool:
    """Tells whether every row of a part is there, made or failed."""
    return result["parts"].get(part, {}).get("left_out") == []


def rows(result: dict[str, Any], kind: str | None = None) -> dict[str, dict[str, Any]]:
    """Returns the rows that are done, by name; kind: those of one kind."""
    found = {}
    for part in result["parts"].values():
        for name, row in part["rows"].items():
            if chip_parts.is_done(row) and kind in (None, row.get("kind")):
                found[name] = row
    return found


def stored(folder: Path) -> list[dict[str, Any]]:
    """Reads the results in a folder."""
    return [chip_parts.read(file) for file in sorted(folder.glob("*.json"))]


# What the rows say.


def proof(result: dict[str, Any], form: str = "") -> dict[str, dict[str, Any]]:
    """Returns the rows of the proof that are done, of one form or of all, by name."""
    made = result["parts"].get("proof", {"rows": {}})["rows"]
    return {
        name: row for name, row in made.items() if name.startswith(form) and chip_parts.is_done(row)
    }


def disagreeing(result: dict[str, Any], form: str = "") -> list[str]:
    """Returns the rows of the proof, of one form or of all, that failed or do not agree."""
    return [name for name, row in proof(result, form).items() if not row.get("passed")]


def is_proven(result: dict[str, Any], kernel: str) -> bool:
    """Tells whether a kernel agrees in every row of the proof, and none is missing."""
    if result["about"]["small"] or not proof(result, kernel):
        return False
    left_out = result["parts"]["proof"].get("left_out")
    if left_out is None:  # its process was stopped
        return False
    return not disagreeing(result, kernel) and not any(name.startswith(kernel) for name in left_out)


def record(result: dict[str, Any]) -> str:
    """Notes on this machine which kernels are proven; returns a line that says so for each."""
    about = result["about"]
    if about["small"] or not about["kernels"]:
        why = "in small" if about["small"] else "this platform has no kernel"
        return f"proof: nothing to record: {why}"
    return "\n".join(record_kernel(result, kernel) for kernel in about["kernels"])


def record_kernel(result: dict[str, Any], kernel: str) -> str:
    """Notes on this machine whether a kernel is proven; returns a line that says so."""
    about = result["about"]
    where = f"proof: {kernel} on {about['family']}"
    failed = disagreeing(result, kernel)
    proven = is_proven(result, kernel)
    if not failed and not proven:
        return f"{where}: not proven yet, rows are missing; run the same command again"
    of_run = {key: about[key] for key in ("device", "date", "jax", "code")}
    try:
        path = choice.record_proof(kernel, about["family"], of_run if proven else None)
    except OSError as error:
        verdict = "proven" if proven else "NOT proven"
        return f"{where}: {verdict}; no record could be written: {error}"
    if proven:
        return f"{where}: proven; `auto` takes it on this machine ({path})"
    return f"{where}: NOT proven, {len(failed)} rows failed: {'; '.join(failed)}"


def summary(result: dict[str, Any]) -> str:
    """Says what failed, and what was left out."""
    lines = []
    for name, row in rows(result).items():
        if "failed" in row:
            lines.append(f"failed: {name}: {row['failed']}")
        elif row.get("batch") == 0:
            lines.append(f"does not fit at batch 1: {name}")
        elif row.get("passed") is False:
            lines.append(f"does not agree: {name}: {json.dumps(row)}")
    for part in SHARES:
        kept = result["parts"].get(part, {})
        if not is_complete(result, part):
            missing = "; ".join(kept.get("left_out", ())) or "not finished"
            lines.append(
                f"left out for want of time: {part}: {missing}; run the same command again"
            )
    return "\n".join(lines) or "all rows are there, and none failed"


HEAD = (
    "chip | driver | jax / jaxlib | date | XLA_FLAGS | kernel | attention rows that agree"
    " | products, TFLOP/s | copy, GB/s | 16 latents | 64 latents"
    " | evaluation | decoding, batch 1 / 8"
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Makes a row in Markdown for each result.

    Part `use` runs without the flag NEEDED. Of steps: sequences per second, MFU against the data
    sheet and against the products measured here, how many times the dense form and PyTorch, batch,
    remat, memory. Of evaluation: tokens per second, and share of the products. Of decoding: ms per
    token, and share of a copy's bandwidth.
    """
    head = HEAD.split(" | ")
    rows = [cells(result) for result in results]
    return markdown(head, rows or [["none so far", *[""] * (len(head) - 1)]])


def cells(result: dict[str, Any]) -> list[str]:
    """Returns the cells of a row, in the order of HEAD."""
    about = result["about"]
    compared = len(proof(result))
    agree = compared - len(disagreeing(result))
    whole = "" if is_complete(result, "proof") else ", unfinished"
    copies = [row["gb_per_second"] for row in rows(result, "copy").values()]
    verdicts = [
        f"{kernel}, {'proven' if is_proven(result, kernel) else 'not proven'}"
        for kernel in about["kernels"]
    ]
    ceiling = best_product(result)
    return [
        f"{about['device']} ({about['family']})" + ", in small" * about["small"],
        about["driver"],
        f"{about['jax']} / {about['jaxlib']}",
        about["date"][:10],
        f"`{about['xla_flags']}`" if about["xla_flags"] else "",
        "; ".join(verdicts) or "none",
        f"{agree} of {compared}{whole}",
        common.cell(ceiling),
        common.cell(max(copies, default=None)),
        of_steps(result, 16),
        of_steps(result, 64),
        of_evaluation(result),
        of_decoding(result),
    ]


def best_product(result: dict[str, Any]) -> float | None:
    """Returns TFLOP/s of the fastest matrix product."""
    return max((row["tflops"] for row in rows(result, "product").values()), default=None)


def speed(row: dict[str, Any] | None) -> float | None:
    """Returns sequences per second; None where there is no time."""
    return row["batch"] / row["ms"] * 1e3 if row and row.get("ms") else None


def share(part: float, whole: float | None) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def of_steps(result: dict[str, Any], latents: int) -> str:
    """Says how fast the chip's best step is, beside the other forms."""
    made = rows(result, "step").values()
    steps = [row for row in made if row["latents"] == latents and row.get("ms")]
    if not steps:
        return "-"
    others = {row["form"]: speed(row) for row in steps if row["form"] in ("dense", "torch")}
    best = max((row for row in steps if row["form"] not in others), key=speed, default=None)
    if best is None:
        return "-"
    tflops = best["tflop"] / best["ms"] * 1e3
    of_peak = share(tflops, result["about"]["peak_tflops"])
    of_products = share(tflops, best_product(result))
    memory = common.cell(best.get("needs_gib"))
    said = [
        f"{speed(best):.2f}/s",
        f"MFU {of_peak} / {of_products}",
        *(f"{speed(best) / other:.1f} x {form}" for form, other in others.items()),
        f"{best['form']}, B {best['batch']}, {best['remat']}, {memory} GiB",
    ]
    if best["layers"] != common.ARCHITECTURES["gemma2_2b"].num_layers:
        said.append(f"{best['layers']} layers")
    return ", ".join(said)


def of_evaluation(result: dict[str, Any]) -> str:
    found = [row for row in rows(result, "evaluation").values() if row.get("ms")]
    if not found:
        return "-"
    row = found[0]
    of_products = share(row["tflop"] / row["ms"] * 1e3, best_product(result))
    return f"{row['tokens_per_second']:,.0f} tokens/s ({of_products})"


def of_decoding(result: dict[str, Any]) -> str:
    found = [row for row in rows(result, "decoding").values() if row.get("ms")]
    return " / ".join(f"{row['ms']:.2f} ms ({row['bandwidth_share']:.0%})" for row in found) or "-"


if __name__ == "__main__":
    sys.exit(main())
