"""H1: keys and values inserted in each layer instead of embeddings (Coda-Forno et al. 2025)."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "inserted"
    return c
