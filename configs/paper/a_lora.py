"""Adapters of rank 64 on a coprocessor that is the decoder (the paper's baseline; it has rank 64 and 128)."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.lora_rank = 64
    return c
