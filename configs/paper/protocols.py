"""What all experiments of a protocol share. Each experiment is a file beside this one that says what differs.

  a      the paper's logic on two CPU cores: decoder and coprocessor are trained on the same text. The packaged decoder
         (3.1 M parameters) and the packaged corpus; a run of 1,000 steps takes some twenty minutes.
  a_gpu  the same with a decoder of 49 M parameters that `pretrain.py` trains on the mixture of
         `make_mixture`; one GPU.
  b      SmolLM2-135M, on the same mixture, which is not what it was pretrained on; one GPU.
  b_cpu  the same with the packaged decoder, as in a but twice as long; it has read a twentieth of the mixture.

`--config=configs/paper/overlay.py:b` is an experiment in a protocol, a where none is named; `launch/paper.sh` prepares,
trains, evaluates and reports them. Validation is by work: nothing is trained on any part of a work that is evaluated.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from latent_delib.nn.sizes import SIZES

MIXTURE, TASKS = "runs/mixture", "runs/tasks"  # what make_mixture and make_tasks wrote


def get_config(protocol: str) -> ConfigDict:
    """Raises ValueError for a name that is no protocol."""
    protocols = {"a": a, "a_gpu": a_gpu, "b": b, "b_cpu": b_cpu}
    if protocol not in protocols:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(protocols)}")
    c = base.get_config()
    c.method.placement = "overlay"
    c.data.token_files = f"runs/paper/{protocol}/tokens"
    protocols[protocol](c)
    return c


def a(c: ConfigDict) -> None:
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES["gemma2_3m"]))
    c.method.num_traces = 16
    c.data.seq_len = 256
    c.optimizer.warmup_steps = 50
    c.train.steps = 1000
    c.train.batch_size = 8
    c.train.checkpoint_every = c.train.keep_every = 250  # all stay: the learning curve
    c.compute.dtype = "float32"
    c.compute.remat = "none"
    c.evaluate.max_length = 256
    c.evaluate.batch_size = 4
    c.evaluate.max_pieces = 200
    c.evaluate.max_positions = 32


def _mixture(c: ConfigDict) -> None:
    c.data.sources = (f"files:{MIXTURE}/train/*.txt",)
    c.data.validation = (f"files:{MIXTURE}/validation/*.txt", f"files:{MIXTURE}/unseen/*.txt")


def b_cpu(c: ConfigDict) -> None:
    a(c)
    _mixture(c)
    c.train.steps = 2000  # twice a's: there is more to learn here, and no row comes twice
    c.train.checkpoint_every = c.train.keep_every = 500
    c.evaluate.max_pieces = 100  # of each of two


def _gpu(c: ConfigDict) -> None:
    _mixture(c)
    c.method.num_traces = 32
    c.data.seq_len = 512
    c.optimizer.warmup_steps = 200
    c.train.steps = 4300
    c.train.batch_size = 16
    c.train.checkpoint_every = c.train.keep_every = 430
    c.evaluate.max_length = 512
    c.evaluate.max_pieces = 400
    c.evaluate.max_positions = 64


def a_gpu(c: ConfigDict) -> None:
    _gpu(c)
    c.decoder.path = "runs/paper/a_gpu/pretrain/decoder"
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES["gemma2_49m"]))


def b(c: ConfigDict) -> None:
    _gpu(c)
    c.decoder.path = "runs/smollm2_135m/decoder"
    c.decoder.architecture = ConfigDict(dataclasses.asdict(SIZES["smollm2_135m"]))


def adapt_to_tasks(c: ConfigDict, protocol: str) -> None:
    """The text of `make_tasks` instead of the protocol's, and as many steps as see each problem a few times."""
    c.data.sources = (f"files:{TASKS}/text/train/*.txt",)
    c.data.validation = (f"files:{TASKS}/text/test/*.txt",)
    c.data.token_files = f"runs/paper/{protocol}/task_tokens"
    c.optimizer.warmup_steps = 50
    c.train.steps = 300
    c.train.checkpoint_every = c.train.keep_every = 60
