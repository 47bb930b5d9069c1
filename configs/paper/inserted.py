"""H1: keys and values inserted in each layer instead of embeddings (Coda-Forno et al. 2025)."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "inserted"
    return c
