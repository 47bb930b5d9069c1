"""The coprocessor from a random start (the paper's baseline)."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "from_scratch"
    return c
