"""Static soft tokens: N_L trained vectors."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "static_tokens"
    return c
