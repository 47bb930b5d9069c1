"""A coprocessor of half the decoder's depth; named as future work by the paper."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "resized"
    c.method.coprocessor = ConfigDict({"num_layers": 2})
    return c
