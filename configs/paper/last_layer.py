"""The coprocessor reads the decoder's last-layer outputs instead of its cache (the paper's baseline)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "last_layer"
    return c
