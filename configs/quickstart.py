"""The main job on a laptop: a coprocessor for the packaged decoder, overlay placement.

  ./launch/quickstart.sh

Three minutes on two CPU cores, after the installation; results under runs/quickstart/.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.method.num_latents = 8
    c.method.placement = "overlay"
    c.method.num_traces = 16
    c.data.seq_len = 128
    c.optimizer.name = "muon"
    c.optimizer.b1 = 0.95
    c.optimizer.learning_rate = 4e-3
    c.optimizer.soft_token_learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    c.optimizer.final_fraction = 0.02
    c.train.steps = 2000
    c.train.batch_size = 8
    c.train.checkpoint_every = 500
    c.compute.cpu_devices = 2
    c.compute.dtype = "float32"
    c.compute.remat = "dots"
    c.evaluate.max_length = 128
    c.evaluate.batch_size = 32
    c.evaluate.max_pieces = 2000
    c.evaluate.max_positions = 16
    return c
