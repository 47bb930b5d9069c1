"""The coprocessor reads the decoder's last-layer outputs instead of its cache (the paper's baseline)."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "last_layer"
    return c
