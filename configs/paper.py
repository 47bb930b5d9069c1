"""The experiments, one row each: `--config=configs/paper.py:PROTOCOL/EXPERIMENT`.

`launch/paper.sh` prepares, trains, evaluates and reports them; `python -m configs.paper` lists
them. Validation is by work, or by problem: nothing is trained on any part of a work that is
evaluated, or on a problem that is asked. Keys that neither protocol nor row sets have the values of
base.py, with three exceptions: the placement is `overlay`, the token files are the protocol's, and
all checkpoints are kept.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from configs.protocols import HOPS_WRITTEN, PROTOCOLS
from latent_delib.nn.sizes import SIZES

SHORT_TEXT = {"method.visible_text": 16}
SLOW = {"optimizer.learning_rate": 3e-4}  # where the decoder's own weights are trained
TASKS = {  # made by tools.make_tasks; these steps see each problem a few times
    "data.sources": ("files:runs/tasks/text/train/*.txt",),
    "data.weights": (1.0,),
    "data.validation": ("files:runs/tasks/text/test/*.txt",),
    "data.token_files": "runs/paper/{protocol}/task_tokens",
    "method.lora_rank": 64,
    "optimizer.warmup_steps": 50,
    "train.steps": 300,
    "train.checkpoint_every": 60,
}
# Experiment -> what differs from `overlay`.
EXPERIMENTS = {  # launch/paper.sh reads the names from these lines
    # Cache augmentation (Liu et al. 2025), by placement and number of latents. overlay: latents
    # share positions with the text that they follow. after, the paper's: they follow the text, and
    # later text moves on. before: they precede the last token of the text, which is read again.
    "overlay": {},
    "overlay_4": {"method.num_latents": 4},
    "overlay_8": {"method.num_latents": 8},
    "overlay_32": {"method.num_latents": 32},
    "overlay_64": {"method.num_latents": 64},
    "after": {"method.placement": "after"},
    "after_4": {"method.placement": "after", "method.num_latents": 4},
    "after_8": {"method.placement": "after", "method.num_latents": 8},
    "after_32": {"method.placement": "after", "method.num_latents": 32},
    "after_64": {"method.placement": "after", "method.num_latents": 64},
    "before": {"method.placement": "before"},
    # Ahead tokens in training; the paper compares 4, 8, 16 and 32.
    "ahead_4": {"method.num_ahead": 4},
    "ahead_8": {"method.num_ahead": 8},
    "ahead_32": {"method.num_ahead": 32},
    # Training steps, as multiples of the protocol's.
    "steps_8th": {"train.steps": lambda steps: steps // 8},
    "steps_4th": {"train.steps": lambda steps: steps // 4},
    "steps_half": {"train.steps": lambda steps: steps // 2},
    "steps_x2": {"train.steps": lambda steps: steps * 2},
    "steps_x4": {"train.steps": lambda steps: steps * 4},
    "after_x4": {"method.placement": "after", "train.steps": lambda steps: steps * 4},
    # Latents come late by 0 to 3 tokens, drawn for each trace.
    "delay": {"method.max_delay": 3},
    # The paper's baselines: a random start, the decoder's last layer instead of its cache, adapters
    # of the paper's ranks, and N_L trained vectors, which the paper calls pause tokens (here
    # static_tokens). pause_tokens: one vector N_L times (Goyal et al. 2023).
    "from_scratch": {"method.name": "from_scratch"},
    "last_layer": {"method.name": "last_layer"},
    "lora": {"method.lora_rank": 64},
    "lora_128": {"method.lora_rank": 128},
    "static_tokens": {"method.name": "static_tokens"},
    "static_tokens_x4": {"method.name": "static_tokens", "train.steps": lambda steps: steps * 4},
    "pause_tokens": {"method.name": "pause_tokens"},
    # Named as future work by the paper: latents one after another, and a coprocessor of another
    # depth than the decoder's. That one starts from random weights: compare it with from_scratch.
    "sequential": {"method.name": "sequential"},
    "half": {"method.name": "resized"},
    "double": {"method.name": "resized"},
    # Coda-Forno et al. 2025: keys and values inserted in each layer (H1), decoder and coprocessor
    # trained together (H2), one model that writes its own latents (the unified baseline).
    "inserted": {"method.name": "inserted"},
    "joint": {"method.name": "joint"} | SLOW,
    "unified": {"method.name": "unified"} | SLOW,
    "unified_fast": {"method.name": "unified"},
    # Related methods (docs/method.md): latent tokens (with 16 ahead tokens a trace has 16 of them);
    # SoftCoT and Cache-to-Cache, which need a second decoder of the same vocabulary; Cartridges;
    # Coconut.
    "latent_tokens": {
        "method.name": "latent_tokens",
        "method.placement": "shared",
        "method.num_latents": 4,
        "method.every": 4,
    },
    "assistant": {"method.name": "assistant", "method.assistant": "{assistant}"},
    "cartridge": {"method.name": "cartridge"},
    "feedback": {"method.name": "feedback"} | SLOW,
    "feedback_fast": {"method.name": "feedback"},
    # Latents in place of written steps, or of all text but the last 16 tokens. The decoder that has
    # read them may teach (CODI, KaVa).
    "distilled": {"method.distill": 0.5} | HOPS_WRITTEN,
    "short_text": SHORT_TEXT,
    "short_text_distilled": SHORT_TEXT | {"method.distill": 0.5},
    "short_text_static": SHORT_TEXT | {"method.name": "static_tokens"},
    # Controls: the decoder itself, trained for as long on the same text: in whole, at a small rate
    # or at the coprocessor's rate, and by adapters.
    "decoder": {"method.name": "decoder"} | SLOW,
    "decoder_fast": {"method.name": "decoder"},
    "decoder_lora": {"method.name": "decoder", "method.lora_rank": 64},
    # Adaptation to tasks: adapters of rank 64 on the decoder (the paper's Figure 6 has rank 128,
    # GSM8K and MATH), and on the coprocessor that `overlay` trained.
    "adapt_decoder": {"method.name": "decoder"} | TASKS,
    "adapt_coprocessor": {"method.start": "runs/paper/{protocol}/overlay@0/checkpoints/{steps}"}
    | TASKS,
    # The decoder itself, from random weights, or from the packaged decoder's (FURTHER).
    "pretrain": {
        "seed": 1000,  # the experiments read the same text, and must not read it in the same order
        "decoder.path": "",
        "method.name": "decoder",
    },
}


def get_config(name: str = "lab/overlay") -> ConfigDict:
    """Returns the config of an experiment in a protocol, "PROTOCOL/EXPERIMENT".

    Raises:
      ValueError: there is no such protocol or experiment.
    """
    protocol, _, experiment = name.partition("/")
    if protocol not in PROTOCOLS or experiment not in EXPERIMENTS:
        known = f"PROTOCOL one of {', '.join(PROTOCOLS)}, "
        known += f"EXPERIMENT one of {', '.join(EXPERIMENTS)}"
        raise ValueError(f"{name!r}: expected PROTOCOL/EXPERIMENT, {known}")
    if experiment == "distilled" and protocol != "hops":
        raise ValueError(
            f"{name!r}: needs questions with steps; only hops has them: hops/distilled"
        )
    if name == "plus_minus/latent_tokens":
        raise ValueError(f"{name!r}: its answers are too short for latents after every 4 tokens")
    size, settings, pretrain, assistant = PROTOCOLS[protocol]
    c = base.get_config()
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES[size]))
    c.data.token_files = f"runs/paper/{protocol}/tokens"
    c.method.placement = "overlay"
    c.update_from_flattened_dict(settings)
    steps = c.train.steps
    row = EXPERIMENTS[experiment]
    if experiment == "pretrain":
        row = row | pretrain
    for key, value in row.items():
        if callable(value):
            value = value(steps)
        if isinstance(value, str):
            value = value.format(protocol=protocol, steps=steps, assistant=assistant)
        c.update_from_flattened_dict({key: value})
    if "train.keep_every" not in settings | row:  # all are kept, for the learning curve
        c.train.keep_every = c.train.checkpoint_every
    layers = c.decoder.architecture.num_layers
    if experiment == "half":
        c.method.coprocessor = ConfigDict({"num_layers": layers // 2})
    if experiment == "double":
        c.method.coprocessor = ConfigDict({"num_layers": layers * 2})
    return c


if __name__ == "__main__":
    print("\n".join(EXPERIMENTS))
