"""Coconut's curriculum for a coprocessor: latents take the place of the steps of protocol `hops`.

  ./launch/paper.sh hops/overlay    # makes the decoder, which writes its steps, and the questions
  CONFIG=hops_curriculum QUESTIONS=runs/questions/hops FIRST=1 STAGES=4 THOUGHTS=9 \
    RUN=runs/paper/hops/curriculum@0 ./launch/coconut.sh

A written step has nine tokens.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    c = paper.get_config("hops/sequential")
    c.method.placement = "after"
    c.method.num_ahead = 48  # the longest reply without its first step
    c.optimizer.learning_rate = 3e-3
    c.optimizer.final_fraction = 0.2
    return c
