"""The published setting (Liu et al. 2025, Section 2.3): Gemma 2 2B, 100,000 steps of batch 1024.

The training step at full size, with random weights, compiled for 16 chips:

  python -m latent_delib.train --config=configs/gemma2_2b.py --workdir=DIR \
      --config.mesh.fsdp=16 --config.train.accumulation=64 --dry_run --topology=v5e:4x4

With the published weights, on one GPU; GEMMA is a Hugging Face folder, an orbax checkpoint or a
GGUF:

  python -m latent_delib.convert --source=GEMMA --out=runs/gemma2_2b --size=gemma2_2b
  python -m latent_delib.train --config=configs/gemma2_2b.py --workdir=DIR \
      --config.decoder.path=runs/gemma2_2b --config.train.accumulation=256 \
      --text='TEXT/*.txt' --held_out='HELD_OUT/*.txt'

A job of many processes takes token files instead of --text: launch/README.md has its commands.

T is 2048, M 128, N_A 16; N_L is --config.method.num_latents, 4 to 64 in the paper. A batch is
computed in parts; docs/scaling.md says which parts fit on which slice.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from latent_delib.nn.sizes import SIZES


def get_config(size: str = "gemma2_2b") -> ConfigDict:
    c = base.get_config()
    c.decoder.path = ""  # random weights, until a converted checkpoint of this size is named
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES[size]))
    return c
