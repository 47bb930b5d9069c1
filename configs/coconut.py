"""Coconut's curriculum on two CPU cores: the packaged decoder feeds its outputs back as inputs.

  ./launch/coconut.sh

The script sets the questions, the number of latents and the steps of each stage.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.method.name = "feedback"
    c.method.placement = "after"
    c.method.prompt_end = "Answer:"
    c.method.num_traces = 5
    c.method.num_ahead = 64  # the longest reply; later tokens are not learned
    c.data.seq_len = 512
    c.train.batch_size = 2
    c.optimizer.learning_rate = 3e-4
    return c
