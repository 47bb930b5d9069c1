"""Cache augmentation, placement overlay: latents share positions with the text they follow."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    return c
