"""Cache augmentation, placement before: latents stand between the text and its last token, which is read again."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.placement = "before"
    return c
