"""A coprocessor for a real pretrained decoder, SmolLM2-135M, on one GPU.

  LATENT_DELIB_EXTRAS=cuda ./launch/gpu.sh ./launch/smollm2.sh
  CONFIG=smollm2_135m_cpu ./launch/smollm2.sh     the smallest form, on two CPU cores

The script gets the decoder and evaluates it alone, then trains and evaluates a coprocessor. The
learning rate, 1e-3, was the best of 1e-4, 3e-4 and 1e-3 in an earlier study of this size, of which
no file is kept.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from latent_delib.nn.sizes import SIZES


def get_config() -> ConfigDict:
    c = base.get_config()
    c.decoder.path = "runs/smollm2_135m/decoder"
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES["smollm2_135m"]))
    c.method.placement = "overlay"
    c.method.num_traces = 32
    c.data.seq_len = 512
    c.optimizer.warmup_steps = 200
    c.train.steps = 4300
    c.train.batch_size = 16
    c.evaluate.max_length = 512
    c.evaluate.max_pieces = 256
    return c
