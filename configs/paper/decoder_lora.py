"""Control: the decoder trained on by adapters of rank 64, at the rate of the coprocessors, 1e-3."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "decoder"
    c.method.lora_rank = 64
    return c
