"""Control: the decoder trained on for as long, on the same text."""

from ml_collections import ConfigDict

from configs.paper import protocol_a


def get_config() -> ConfigDict:
    c = protocol_a.get_config()
    c.method.name = "decoder"
    c.optimizer.learning_rate = 3e-4
    return c
