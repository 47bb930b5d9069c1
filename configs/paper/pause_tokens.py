"""Pause tokens: one trained vector, N_L times (Goyal et al. 2023)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "pause_tokens"
    return c
