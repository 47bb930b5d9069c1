"""The experiments, one row each: `--config=configs/paper.py:PROTOCOL/EXPERIMENT`.

`launch/paper.sh` prepares, trains, evaluates and reports them; `python -m configs.paper` lists
them. Validation is by work, or by problem: nothing is trained on any part of a work that is
evaluated, or on a problem that is asked. Keys that neither protocol nor row sets have the values of
base.py, with three exceptions: the placement is `overlay`, the token files are the protocol's, and
all checkpoints are kept.
"""

import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from latent_delib.nn.sizes import SIZES

MIXTURE = {  # made by tools.make_mixture
    "data.sources": ("files:runs/mixture/train/*.txt",),
    "data.validation": ("files:runs/mixture/validation/*.txt", "files:runs/mixture/unseen/*.txt"),
}
PROBLEMS = {  # made by tools.make_problems
    "data.sources": ("files:runs/problems/text/train/*.txt",),
    "data.validation": ("files:runs/problems/text/test/*.txt",),
    "decoder.path": "runs/paper/problems/pretrain/decoder",
    "decoder.tokenizer": "packaged",
    "method.prompt_end": "=",
    "method.num_traces": 6,  # the most problems in a row
    "train.batch_size": 32,
    "train.steps": 4000,
}
FAR = PROBLEMS | {  # made by tools.make_problems --kinds=follow,far
    "data.sources": ("files:runs/follow/text/train/far.txt",),
    "data.validation": ("files:runs/follow/text/test/far.txt",),
    "data.token_files": "runs/paper/depth/far_tokens",
    "decoder.path": "runs/paper/depth/pretrain/decoder",
    "method.num_traces": 4,
    "method.num_ahead": 10,  # the whole answer
    "train.steps": 12_000,
    "train.checkpoint_every": 3000,
}
QUESTIONS = PROBLEMS | {  # made by tools.make_questions
    "data.sources": ("qa:runs/questions/countdown.train.jsonl",),
    "data.validation": ("qa:runs/questions/countdown.test.jsonl",),
    "decoder.path": "runs/paper/questions/pretrain/decoder",
    "method.prompt_end": "Answer:",
    "method.num_latents": 4,
    "method.num_traces": 4,
    "method.num_ahead": 12,  # the whole answer
    "train.steps": 1200,
    "train.checkpoint_every": 400,
    "train.validate_every": 400,
}
HOPS = QUESTIONS | {
    "data.sources": ("qa:runs/questions/hops.train.jsonl",),
    "data.validation": ("qa:runs/questions/hops.test.jsonl",),
    "data.token_files": "runs/paper/hops/answer_tokens",
    "decoder.path": "runs/paper/hops/pretrain/decoder",
    "method.num_latents": 16,
    "method.num_traces": 2,
    "method.num_ahead": 8,  # the whole answer, and its line break
    "train.steps": 6000,
    "train.checkpoint_every": 1000,
    "train.validate_every": 1000,
}
PLUS_MINUS = {  # made by tools.make_questions; two CPU cores
    "data.sources": ("qa:runs/questions/plus_minus.train.jsonl",),
    "data.validation": ("qa:runs/questions/plus_minus.test.jsonl",),
    "data.seq_len": 256,
    "decoder.path": "runs/smollm2_135m/decoder",
    "method.prompt_end": "Answer:",
    "method.num_latents": 4,
    "method.num_traces": 12,  # the most questions in a row, or nearly
    "method.num_ahead": 4,  # the whole answer, and its line break
    "optimizer.learning_rate": 3e-4,
    "optimizer.warmup_steps": 20,
    "train.steps": 600,
    "train.batch_size": 2,
    "train.checkpoint_every": 300,
    "train.validate_every": 150,
    "compute.dtype": "float32",
    "compute.remat": "none",
    "evaluate.num_ahead": 4,
    "evaluate.max_length": 64,
    "evaluate.batch_size": 32,
    "evaluate.positions": 1,  # a question has one prompt
}
HOPS_WRITTEN = {  # the same questions with their steps
    "data.sources": ("qa_steps:runs/questions/hops.train.jsonl",),
    "data.validation": ("qa_steps:runs/questions/hops.test.jsonl",),
    "data.token_files": "runs/paper/hops/tokens",
}
GPU = {
    "method.num_traces": 32,
    "data.seq_len": 512,
    "optimizer.warmup_steps": 200,
    "train.steps": 4300,
    "train.batch_size": 16,
    "train.checkpoint_every": 430,
    "evaluate.max_length": 512,
    "evaluate.max_pieces": 400,
    "evaluate.max_positions": 64,
}
MUON = {  # lower training perplexity than AdamW (docs/results_text.md)
    "optimizer.name": "muon",
    "optimizer.b1": 0.95,
    "optimizer.learning_rate": 4e-3,
    "optimizer.soft_token_learning_rate": 2e-3,
    "optimizer.final_fraction": 0.02,
}
LAB = MUON | {  # two CPU cores
    "method.num_traces": 16,
    "data.seq_len": 128,
    "optimizer.warmup_steps": 100,
    "train.steps": 8000,  # 16 M predicted tokens: 100 for each parameter, as in the paper
    "train.batch_size": 8,
    "train.checkpoint_every": 1000,
    "compute.cpu_devices": 2,
    "compute.dtype": "float32",
    "compute.remat": "dots",
    "evaluate.max_length": 128,
    "evaluate.batch_size": 32,
    "evaluate.max_pieces": 2000,
    "evaluate.max_positions": 16,
}
LAB_GPU = MUON | {  # one GPU; optimizer and proportions of `lab`
    "data.sources": (
        "hf:allenai/c4/realnewslike:train:text",  # 38 GB of news
        "hf:HuggingFaceFW/fineweb-edu/sample-10BT:train:text",  # some 48 GB of pages that teach
    ),
    "data.weights": (38.0, 48.0),  # so that both are read once
    "data.validation": (
        "hf:allenai/c4/realnewslike:validation:text",
        "files:runs/mixture/validation/*.txt",
    ),
    "decoder.path": "runs/paper/lab_gpu/pretrain/decoder",
    "decoder.tokenizer": "runs/paper/lab_gpu/tokenizer.model",  # of tools.make_vocabulary
    "train.steps": 93_000,  # 3.0 G predicted tokens
    "train.batch_size": 64,
    "train.checkpoint_every": 9300,
    "evaluate.max_pieces": 2000,
}
PRETRAIN_LAB = {
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.learning_rate": 8e-3,
    "optimizer.warmup_steps": 500,
    "optimizer.final_fraction": 0.01,
    "optimizer.weight_decay": 0.03,
    "train.batch_size": 32,
    "train.keep_every": 10_000,
    "compute.cpu_devices": 1,
}
FURTHER = {  # the packaged decoder is trained further; questions are learned too
    "decoder.path": "packaged",
    "method.prompt_end": "",
}
PRETRAIN_PROBLEMS = FURTHER | {
    "data.sources": (*MIXTURE["data.sources"], *PROBLEMS["data.sources"]),
    "data.weights": (1.0, 1.0),
    "data.validation": (*MIXTURE["data.validation"], *PROBLEMS["data.validation"]),
    "train.steps": 10_000,
}
PRETRAIN_DEPTH = FURTHER | {
    "data.sources": ("files:runs/follow/text/train/follow.txt",),
    "data.validation": ("files:runs/follow/text/test/follow.txt",),
    "data.token_files": "runs/paper/depth/tokens",
    "train.steps": 20_000,
}
PRETRAIN_QUESTIONS = FURTHER | {
    # Stopped early: for a decoder near its plateau, latents learn little in so few steps.
    "optimizer.final_fraction": 1.0,
    "train.steps": 1500,
    "train.checkpoint_every": 500,
    "train.validate_every": 500,
}
PRETRAIN_HOPS = HOPS_WRITTEN | {
    "train.steps": 3000,
    "train.checkpoint_every": 1000,
    "train.validate_every": 1000,
}
PRETRAIN_LAB_GPU = {
    "decoder.export_dtype": "bfloat16",
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 1000,
    "optimizer.final_fraction": 0.01,
    "optimizer.weight_decay": 0.1,
    "train.batch_size": 256,
    "train.steps": 196_000,  # 26 G tokens, about all, by estimate
    "train.keep_every": 49_000,
}


class Protocol(NamedTuple):
    """Describes a decoder, a text and a budget.

    size: the decoder's size, a key of SIZES.
    settings: key -> value, where all experiments differ from base.py.
    pretrain: key -> value, where experiment `pretrain`, which makes the decoder, differs from them.
    assistant: path of another decoder of the same vocabulary.
    """

    size: str
    settings: dict[str, Any]
    pretrain: dict[str, Any] = {}
    assistant: str = "packaged"


def smaller_lab(name: str, size: str, steps: int, pretrain_steps: int) -> Protocol:
    """Returns `lab` with a smaller decoder, made first; equal proportions need fewer steps."""
    settings = {
        "decoder.path": f"runs/paper/{name}/pretrain/decoder",
        "decoder.tokenizer": "packaged",
        "data.token_files": "runs/paper/lab/tokens",
        "train.steps": steps,
        "train.checkpoint_every": steps // 4,
    }
    pretrain = {"train.steps": pretrain_steps, "train.checkpoint_every": 1000}
    return Protocol(size, LAB | MIXTURE | settings, PRETRAIN_LAB | pretrain)


PROTOCOLS = {
    # The paper's proportions in miniature: the packaged decoder (0.16 M parameters) has read 1,000
    # tokens of the mixture for each parameter, and coprocessors are trained on the same mixture.
    "lab": Protocol(
        "gemma2_160k",
        LAB | MIXTURE,
        PRETRAIN_LAB | {"train.steps": 40_000},
        assistant="runs/paper/lab_58k/pretrain/decoder",
    ),
    "lab_58k": smaller_lab("lab_58k", "gemma2_58k", 2800, 14_000),
    "lab_23k": smaller_lab("lab_23k", "gemma2_23k", 1120, 5600),
    # Nearly the same proportions for 30 M parameters, on text of the Hub, which is read once.
    "lab_gpu": Protocol("gemma2_30m", GPU | LAB_GPU, PRETRAIN_LAB_GPU),
    # Reasoning in miniature: the packaged decoder is trained further, with problems in half of its
    # rows, until it solves about half of them. Then a coprocessor is called once, at the end of
    # each problem.
    "problems": Protocol("gemma2_160k", LAB | PROBLEMS, PRETRAIN_LAB | PRETRAIN_PROBLEMS),
    # More steps than the decoder has learned: it learns 1.6 million look-ups of one to three steps.
    # Then coprocessors, or the decoder itself, are trained on look-ups of four to six steps.
    "depth": Protocol("gemma2_160k", LAB | FAR, PRETRAIN_DEPTH),
    # The packaged decoder is trained further, with questions, until it answers some of them. Then
    # each experiment is trained on the answers.
    "questions": Protocol("gemma2_160k", LAB | QUESTIONS, PRETRAIN_LAB | PRETRAIN_QUESTIONS),
    # Latents instead of steps: the packaged decoder learns to answer in written steps. Then each
    # experiment learns to answer at once. The decoder that has read the steps teaches `distilled`.
    "hops": Protocol("gemma2_160k", LAB | HOPS, PRETRAIN_LAB | FURTHER | PRETRAIN_HOPS),
    # A real decoder: SmolLM2-135M as it was published; nothing is pretrained.
    "plus_minus": Protocol("smollm2_135m", PLUS_MINUS),
    # SmolLM2-135M on the mixture, which is not what it was pretrained on; one GPU.
    "b": Protocol("smollm2_135m", GPU | MIXTURE | {"decoder.path": "runs/smollm2_135m/decoder"}),
}

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
