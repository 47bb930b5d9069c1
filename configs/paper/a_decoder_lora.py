"""Control: the same by adapters of rank 64."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "decoder"
    c.method.lora_rank = 64
    return c
