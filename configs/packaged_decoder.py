"""Makes the packaged decoder again: a small Gemma 2, trained on the packaged corpus.

  python -m latent_delib.prepare --config=configs/packaged_decoder.py \
      --out=runs/packaged_decoder/tokens
  python -m latent_delib.train --config=configs/packaged_decoder.py \
      --workdir=runs/packaged_decoder --config.data.token_files=runs/packaged_decoder/tokens

The trained decoder lies in runs/packaged_decoder/decoder.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from latent_delib.nn.sizes import SIZES


def get_config() -> ConfigDict:
    c = base.get_config()
    c.decoder.path = ""
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES["gemma2_3m"]))
    c.decoder.tokenizer = "packaged"
    c.decoder.export_dtype = "bfloat16"
    c.method.name = "decoder"
    c.data.seq_len = 256
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.weight_decay = 0.1
    c.train.steps = 3000
    c.train.batch_size = 8
    c.train.checkpoint_every = 100
    c.compute.dtype = "float32"
    c.compute.remat = "dots"
    c.evaluate.max_length = 256
    return c
