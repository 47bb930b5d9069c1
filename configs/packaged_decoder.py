"""Makes the packaged decoder again: a small Gemma 2, trained on the mixture until it is flat.

  python -m tools.make_mixture --out=runs/mixture
  python -m tools.make_vocabulary --text='runs/mixture/train/*.txt' --size=1024 \
      --out=runs/packaged_decoder/tokenizer.model
  python -m latent_delib.prepare --config=configs/packaged_decoder.py \
      --out=runs/packaged_decoder/tokens
  python -m latent_delib.train --config=configs/packaged_decoder.py \
      --workdir=runs/packaged_decoder --config.data.token_files=runs/packaged_decoder/tokens

The trained decoder lies in runs/packaged_decoder/decoder.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base, paper
from latent_delib.nn.sizes import SIZES


def get_config() -> ConfigDict:
    c = base.get_config()
    c.seed = 1000  # a coprocessor reads the same text, and must not read it in the same order
    c.decoder.path = ""
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES["gemma2_160k"]))
    c.decoder.tokenizer = "runs/packaged_decoder/tokenizer.model"
    c.method.name = "decoder"
    c.update_from_flattened_dict(paper.MIXTURE)
    c.data.seq_len = 128
    c.optimizer.learning_rate = 8e-3
    c.optimizer.warmup_steps = 500
    c.optimizer.final_fraction = 0.01
    c.optimizer.weight_decay = 0.03
    c.train.steps = 40_000  # 164 M tokens: 1,000 for each parameter
    c.train.batch_size = 32
    c.train.keep_every = 10_000
    c.compute.dtype = "float32"
    c.compute.remat = "dots"
    c.evaluate.max_length = 128
    return c
