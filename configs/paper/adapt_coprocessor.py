"""Adaptation to tasks: adapters of rank 64 on the coprocessor that overlay.py trained; the decoder stays frozen."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.start = f"runs/paper/{protocol}/overlay@0/checkpoints/{c.train.steps}"
    protocols.adapt_to_tasks(c, protocol)
    c.method.lora_rank = 64
    return c
