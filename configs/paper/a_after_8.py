"""8 latents, placement after."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.placement = "after"
    c.method.num_latents = 8
    return c
