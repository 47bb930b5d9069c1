"""Control: the same by adapters of rank 64."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "decoder"
    c.method.lora_rank = 64
    return c
