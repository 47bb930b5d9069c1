"""Control: the decoder trained on for as long, on the same text, at a rate of 3e-4."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.method.name = "decoder"
    c.optimizer.learning_rate = 3e-4
    return c
