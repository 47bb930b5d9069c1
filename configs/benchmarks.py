"""The benchmarks, one row each: task of the lm-eval harness, shots, and the metric reported.

PUBLISHED are the benchmarks of Liu et al. 2025, Table 2; they need the network once, for their
data. OFFLINE are made locally by `make_tasks`. `benchmark` reads this file, or another of the same
form with --table=FILE.

  task       a task or group of the harness, where its name is not the benchmark's; in a group every
             document counts the same
  shots      worked examples in the prompt
  metric     by its name in the harness: a score from 0 to 1 for each document, which is reported in
             percent, or bits_per_byte
  filter     which reading of a generated answer counts, where the harness has several
  runs_code  the code that the model writes is run: only with --confirm_run_unsafe_code

The paper gives shots and, for DROP, the metric. Other metrics follow the harness's custom: acc_norm
(log p of a choice divided by its length) where choices are sentences of different length, else acc.
All metrics of a task are in OUT/samples.
"""

PUBLISHED = {
    "mmlu": {"shots": 5, "metric": "acc"},
    # gsm8k_cot has the usual eight worked examples, fixed; the harness's gsm8k draws five from the
    # training set. The last number of an answer counts: only this reading suits the decoder,
    # latents and zero-shot CoT alike.
    "gsm8k": {
        "task": "gsm8k_cot",
        "shots": 8,
        "metric": "exact_match",
        "filter": "flexible-extract",
    },
    "drop": {"shots": 3, "metric": "f1"},
    "arc_easy": {"shots": 0, "metric": "acc"},
    "arc_challenge": {"shots": 0, "metric": "acc_norm"},
    "math": {"task": "minerva_math", "shots": 4, "metric": "exact_match"},
    "winogrande": {"shots": 0, "metric": "acc"},
    "piqa": {"shots": 0, "metric": "acc"},
    "siqa": {"task": "social_iqa", "shots": 0, "metric": "acc"},
    "hellaswag": {"shots": 0, "metric": "acc_norm"},
    "boolq": {"shots": 0, "metric": "acc"},
    "mbpp": {"shots": 3, "metric": "pass_at_1", "runs_code": True},
    "humaneval": {
        "shots": 0,
        "metric": "pass@1",
        "filter": "create_test",
        "runs_code": True,
    },
    # The English part. It has no training split: examples are other documents of the test split.
    "agieval": {"task": "agieval_en", "shots": 3, "metric": "acc"},
    "bbh": {"task": "bbh_cot_fewshot", "shots": 3, "metric": "exact_match", "filter": "get-answer"},
    "triviaqa": {"shots": 5, "metric": "exact_match", "filter": "remove_whitespace"},
    "nq": {"task": "nq_open", "shots": 5, "metric": "exact_match", "filter": "remove_whitespace"},
}

OFFLINE = {
    "gsm_symbolic": {"shots": 4, "metric": "exact_match", "filter": "answer"},
    "chain_sum": {"shots": 4, "metric": "exact_match", "filter": "answer"},
    "basic_arithmetic": {"shots": 4, "metric": "exact_match", "filter": "answer"},
    "chain_sum_choice": {"shots": 4, "metric": "acc"},
    "countdown": {"shots": 4, "metric": "acc"},
    "syllogism": {"shots": 4, "metric": "acc"},
    "next_sentence": {"shots": 0, "metric": "acc_norm"},
    "held_out_text": {"shots": 0, "metric": "bits_per_byte"},
}

# The beginning of each answer of model zero_shot_cot, without worked examples (in the paper, on
# GSM8K).
COT = "Let's think step by step."
