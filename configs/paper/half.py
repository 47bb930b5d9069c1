"""A coprocessor of half the decoder's depth; named as future work by the paper."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "resized"
    c.method.coprocessor = ConfigDict({"num_layers": c.decoder.architecture.num_layers // 2})
    return c
