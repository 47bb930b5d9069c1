"""The published figures (Liu et al. 2025), as data: on Gemma-2 2B unless said otherwise."""

from typing import NamedTuple

DECODER = "Gemma-2 2B"
LATENTS = (4, 8, 16, 32, 64)  # of Table 2

# Table 1, Section 3.1: number of latents -> n -> change in perplexity of that token ahead, percent.
PERPLEXITY_CHANGE = {
    8: {1: -1.53, 2: -1.67, 4: -1.39, 8: -1.22, 16: -0.85, 32: -0.55},
    16: {1: -2.48, 2: -2.41, 4: -1.98, 8: -1.56, 16: -1.08, 32: -0.64},
    32: {1: -3.28, 2: -3.15, 4: -2.66, 8: -2.11, 16: -1.50, 32: -0.88},
    64: {1: -3.94, 2: -3.70, 4: -3.17, 8: -2.61, 16: -1.88, 32: -1.20},
}


class Benchmark(NamedTuple):
    """Holds a row of Table 2.

    scores: percent, by number of latents; 0 is the frozen decoder.
    """

    title: str
    setting: str
    scores: dict[int, float]


def _row(title: str, setting: str, *scores: float) -> Benchmark:
    return Benchmark(title, setting, dict(zip((0, *LATENTS), scores, strict=True)))


# Table 2, by our names. The coprocessor is called once, at the end of the prompt.
BENCHMARKS = {
    "mmlu": _row("MMLU", "5-shot", 52.00, 52.45, 52.24, 52.34, 54.61, 56.70),
    "gsm8k": _row("GSM8K", "8-shot", 21.38, 22.67, 23.12, 24.72, 26.76, 31.43),
    "drop": _row("DROP", "3-shot, F1", 53.69, 54.64, 54.91, 56.23, 57.37, 57.77),
    "arc_easy": _row("ARC-e", "0-shot", 80.56, 81.52, 81.57, 83.12, 83.04, 83.67),
    "arc_challenge": _row("ARC-c", "0-shot", 50.26, 51.28, 52.39, 53.24, 54.44, 54.44),
    "math": _row("MATH", "4-shot", 16.50, 16.38, 16.78, 17.00, 17.18, 18.56),
    "winogrande": _row("Winogrande", "0-shot", 64.01, 65.35, 65.35, 66.30, 66.30, 66.61),
    "piqa": _row("PIQA", "0-shot", 78.18, 78.62, 78.67, 78.94, 78.94, 79.00),
    "siqa": _row("SIQA", "0-shot", 51.79, 51.59, 51.64, 51.74, 52.30, 52.00),
    "hellaswag": _row("HellaSwag", "0-shot", 73.77, 74.41, 74.41, 74.82, 75.04, 75.31),
    "boolq": _row("BoolQ", "0-shot", 75.41, 75.29, 77.22, 78.17, 77.03, 76.91),
    "mbpp": _row("MBPP", "3-shot", 30.40, 29.00, 31.60, 31.20, 31.40, 31.80),
    "humaneval": _row("HumanEval", "pass@1", 19.51, 18.29, 19.51, 20.73, 20.73, 22.56),
    "agieval": _row("AGIEval", "3-5-shot", 31.71, 32.18, 30.04, 31.32, 32.78, 33.85),
    "bbh": _row("BBH", "3-shot", 42.22, 42.36, 42.37, 42.53, 42.48, 42.64),
    "triviaqa": _row("TriviaQA", "5-shot", 60.29, 60.30, 60.83, 61.43, 62.05, 62.23),
    "nq": _row("NQ", "5-shot", 17.14, 17.35, 17.89, 18.16, 18.91, 19.20),
}


class Variant(NamedTuple):
    """Holds a line of Section 3's comparisons; None: not published.

    ppl: the perplexity of the first token ahead.
    gsm8k: percent, 8-shot.
    """

    what: str
    latents: int | None
    ppl: float | None
    gsm8k: float | None


FROZEN = Variant("frozen decoder", None, 10.96, 21.38)
AUGMENTED_32 = Variant("cache augmentation", 32, 10.60, 26.76)
PAUSE_TOKENS = (FROZEN, AUGMENTED_32, Variant("pause tokens", 32, 11.63, 22.37))
ZERO_SHOT_COT = (
    FROZEN,
    AUGMENTED_32,
    Variant('zero-shot CoT, "Let\'s think step by step"', None, None, 23.20),
)
COPROCESSORS = (
    AUGMENTED_32,
    Variant("cache augmentation", 64, None, 31.43),
    Variant("from scratch", 32, None, 25.78),
    Variant("from scratch", 64, None, 29.80),
    Variant("LoRA, rank 64", 32, None, 23.35),
    Variant("LoRA, rank 128", 32, None, 24.03),
)
LAST_LAYER = (FROZEN, AUGMENTED_32, Variant("last-layer activations", 32, 10.81, 23.20))
NUM_AHEAD = (
    Variant("4 ahead tokens", 16, None, 24.03),
    Variant("8 ahead tokens", 16, None, 24.11),
    Variant("16 ahead tokens", 16, None, 24.72),
    Variant("32 ahead tokens", 16, None, 23.73),
)
DELAY = (
    Variant("delay 0", 64, None, 31.43),
    Variant("delay 1", 64, None, 27.2),
    Variant("delay 2", 64, None, 27.1),
    Variant("delay 3", 64, None, 26.9),
)
