"""The coprocessor from a random start (the paper's baseline)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "from_scratch"
    return c
