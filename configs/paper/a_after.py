"""Cache augmentation as in the paper: latents follow the text, which moves on."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.placement = "after"
    return c
