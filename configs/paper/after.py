"""Cache augmentation as in the paper: latents follow the text, which moves on."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.placement = "after"
    return c
