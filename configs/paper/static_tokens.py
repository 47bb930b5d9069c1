"""Static soft tokens: N_L trained vectors, which the paper calls pause tokens."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "static_tokens"
    return c
