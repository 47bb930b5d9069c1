"""Adapters of rank 128 on a coprocessor that is the decoder (the paper's baseline)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.lora_rank = 128
    return c
