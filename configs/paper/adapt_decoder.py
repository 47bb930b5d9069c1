"""Adaptation to tasks: adapters of rank 64 on the decoder, trained on `make_tasks`. The paper's
Figure 6 has rank 128, GSM8K and MATH."""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a") -> ConfigDict:
    c = protocols.get_config(protocol)
    protocols.adapt_to_tasks(c, protocol)
    c.method.name = "decoder"
    c.method.lora_rank = 64
    return c
