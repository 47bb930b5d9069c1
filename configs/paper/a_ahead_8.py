"""8 ahead tokens in training; the paper compares 4, 8, 16 and 32."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.num_ahead = 8
    return c
