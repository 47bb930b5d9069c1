"""Protocol A: decoder and coprocessor are trained on the same text, as in the paper; what all its experiments share.

The packaged decoder and the packaged corpus, at a size that two CPU cores finish in a night; validation is by work.
Each experiment is a file beside this one that says what differs; `launch/paper.sh` trains, evaluates and reports them.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.method.placement = "overlay"
    c.method.num_traces = 16
    c.data.token_files = "runs/paper/tokens"
    c.data.seq_len = 256
    c.optimizer.warmup_steps = 50
    c.train.steps = 1000
    c.train.batch_size = 8
    c.train.checkpoint_every = 250
    c.train.keep = 4
    c.compute.dtype = "float32"
    c.compute.remat = "none"
    c.evaluate.max_length = 256
    c.evaluate.batch_size = 4
    c.evaluate.max_pieces = 200
    c.evaluate.max_positions = 32
    return c
