"""Trained for latents that come late: by 0 to 3 tokens, drawn for each trace."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.max_delay = 3
    return c
