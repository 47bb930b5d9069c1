"""Times a training step of every method, in turns on one machine.

  .venv/bin/python -m benchmarks.methods [--json=runs/methods.json] [PROTOCOL/EXPERIMENT ...]

Without names it times the rows of the table of all methods in docs/results.md, which takes its
seconds from docs/results/methods.json. `lab/assistant` needs the decoder of
`./launch/paper.sh lab_58k/pretrain`. A step is the whole one of `train`, with the settings of the
experiment and its devices; the text is random. Only protocols whose decoder has the size of the
packaged one can be timed: lab, problems, depth, questions and hops.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import common, peer_sides
from configs import paper
from latent_delib.machine import distributed
from latent_delib.nn.sizes import TransformerConfig

LAB = (
    "overlay after before from_scratch last_layer lora half double sequential inserted joint "
    "assistant unified unified_fast feedback_fast static_tokens pause_tokens cartridge "
    "latent_tokens decoder decoder_fast decoder_lora"
)
EXPERIMENTS = [*(f"lab/{name}" for name in LAB.split()), "hops/distilled"]


def job(a: argparse.Namespace, *, name: str) -> tuple[ConfigDict, TransformerConfig]:
    """Returns the config of an experiment, and its decoder's architecture."""
    del a
    config = paper.get_config(name)
    config.decoder.path = "packaged"  # `hops` has trained it further; its sizes are the same
    return config, TransformerConfig(**config.decoder.architecture)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.command_line(__doc__)
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of every step")
    parser.add_argument("--json", type=Path, default=Path("runs/methods.json"))
    a = parser.parse_args(argv)
    a.argv = sys.argv[1:] if argv is None else list(argv)
    distributed.split_cores(paper.get_config("lab/overlay").compute.cpu_devices)
    runs = {}
    for name in a.experiments:
        print(f"compiles {name}", flush=True)
        work = peer_sides.train_ours(a, job=partial(job, name=name))
        runs[name] = common.calls(work.run, wait=lambda _: None)
    print(f"times {len(runs)} steps in turns, {a.rounds} times", flush=True)
    rows = []
    for name, seconds in common.measure(runs, a.rounds).items():
        per_step = [each / peer_sides.STEPS for each in seconds]
        rows.append({"experiment": name, **common.spread(per_step)})
    return common.report("methods", a, rows)


if __name__ == "__main__":
    main()
