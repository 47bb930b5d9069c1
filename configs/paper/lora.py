"""Adapters of rank 64 on a coprocessor that is the decoder (the paper's baseline; it has rank 64 and 128)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.lora_rank = 64
    return c
