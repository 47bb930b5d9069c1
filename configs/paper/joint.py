"""H2: decoder and coprocessor trained together (Coda-Forno et al. 2025)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "joint"
    c.optimizer.learning_rate = 3e-4
    return c
