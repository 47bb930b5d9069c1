"""4 latents, placement after."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.placement = "after"
    c.method.num_latents = 4
    return c
