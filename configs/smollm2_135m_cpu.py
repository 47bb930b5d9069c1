"""The smallest form of smollm2_135m.py: minutes on two CPU cores.

CONFIG=smollm2_135m_cpu ./launch/smollm2.sh
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config() -> ConfigDict:
    c = smollm2_135m.get_config()
    c.method.num_latents = 8
    c.method.num_traces = 8
    c.method.num_ahead = 8
    c.data.seq_len = 256
    c.optimizer.learning_rate = 1e-4  # ten times this rate undoes what such small batches teach
    c.optimizer.warmup_steps = 10
    c.train.steps = 100
    c.train.batch_size = 4
    c.train.checkpoint_every = 50
    c.compute.dtype = "float32"
    c.compute.remat = "dots"
    c.evaluate.num_ahead = 16
    c.evaluate.max_length = 256
    c.evaluate.batch_size = 2
    c.evaluate.max_pieces = 8
    return c
