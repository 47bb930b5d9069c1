"""A coprocessor of half the decoder's depth, from random weights, so to be compared with from_scratch; the paper names
smaller ones as future work."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "resized"
    c.method.coprocessor = ConfigDict({"num_layers": c.decoder.architecture.num_layers // 2})
    return c
