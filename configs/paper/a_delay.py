"""Trained for latents that come late: by 0 to 3 tokens, drawn for each trace."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.max_delay = 3
    return c
