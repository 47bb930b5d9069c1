"""Makes the packaged decoder again: a small Gemma 2, trained on the mixture until its loss is flat.

  python -m tools.make_mixture --out=runs/mixture
  python -m tools.make_vocabulary --text='runs/mixture/train/*.txt' --size=1024 \
      --out=runs/packaged_decoder/tokenizer.model
  python -m latent_delib.prepare --config=configs/packaged_decoder.py \
      --out=runs/packaged_decoder/tokens
  python -m latent_delib.train --config=configs/packaged_decoder.py \
      --workdir=runs/packaged_decoder --config.data.token_files=runs/packaged_decoder/tokens

The trained decoder is then in runs/packaged_decoder/decoder.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    c = paper.get_config("lab/pretrain")
    c.decoder.tokenizer = "runs/packaged_decoder/tokenizer.model"
    c.data.token_files = ""
    return c
