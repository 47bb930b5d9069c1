"""Cache augmentation, placement overlay: latents share positions with the text they follow."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    return c
