"""H2: decoder and coprocessor trained together (Coda-Forno et al. 2025)."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "joint"
    c.optimizer.learning_rate = 3e-4
    return c
