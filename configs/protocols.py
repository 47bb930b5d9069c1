"""The protocols of the experiments in paper.py: a decoder, a text and a budget each."""

from typing import Any, NamedTuple

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
MIXED = {  # half of the rows are of the mixture, half are of problems
    "data.sources": (*MIXTURE["data.sources"], *PROBLEMS["data.sources"]),
    "data.weights": (1.0, 1.0),
    "data.validation": (*MIXTURE["data.validation"], *PROBLEMS["data.validation"]),
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
PRETRAIN_PROBLEMS = FURTHER | MIXED | {"train.steps": 10_000}
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
    # The decoder of `problems`. Coprocessors are trained as in the paper: on the text that the
    # decoder was pretrained on, at random positions. The problems are a part of that text.
    "mixed": Protocol(
        "gemma2_160k",
        LAB
        | MIXED
        | {
            "data.token_files": "runs/paper/problems/tokens",
            "decoder.path": "runs/paper/problems/pretrain/decoder",
            "decoder.tokenizer": "packaged",
        },
    ),
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
