"""32 ahead tokens in training; the paper compares 4, 8, 16 and 32."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.num_ahead = 32
    return c
