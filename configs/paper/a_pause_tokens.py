"""Pause tokens: one trained vector, N_L times (Goyal et al. 2023; the paper's baseline)."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "pause_tokens"
    return c
