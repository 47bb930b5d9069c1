"""The decoder of protocol a_gpu: from random weights, 240 M tokens, which is the mixture between two and three times.

`launch/paper.sh` runs it before the first experiment; the decoder comes to lie in runs/paper/a_gpu/pretrain/decoder,
where the protocol looks for it. Its training loss (metrics.jsonl) should be flat at the end; or give it more steps. But
what a decoder knows by heart teaches a coprocessor nothing (docs/results.md): where there is more text, read it once.
"""

from ml_collections import ConfigDict

from configs.paper import protocols


def get_config(protocol: str = "a_gpu") -> ConfigDict:
    c = protocols.get_config(protocol)
    c.seed = 1000  # the experiments read the same text, and are not to read it in the order in which the decoder did
    c.decoder.path = ""
    c.decoder.tokenizer = "packaged"
    c.decoder.export_dtype = "bfloat16"
    c.method.name = "decoder"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 200
    c.optimizer.weight_decay = 0.1
    c.train.batch_size = 64
    c.train.steps = 7400
    c.train.checkpoint_every = 1000
    return c
