"""The main job on a laptop: a coprocessor for the packaged decoder, overlay placement.

  ./launch/quickstart.sh

On two CPU cores a few minutes; results under runs/quickstart/.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.method.num_latents = 8
    c.method.placement = "overlay"
    c.method.num_traces = 8
    c.data.seq_len = 256
    c.optimizer.learning_rate = 3e-3
    c.optimizer.soft_token_learning_rate = 3e-3
    c.optimizer.warmup_steps = 20
    c.train.steps = 180
    c.train.batch_size = 8
    c.train.checkpoint_every = 60
    c.compute.dtype = "float32"
    c.compute.remat = "dots"
    c.evaluate.max_length = 256
    c.evaluate.batch_size = 4
    c.evaluate.max_pieces = 32
    return c
