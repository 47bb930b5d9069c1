"""Gemma 2 9B in the setting of gemma2_2b.py (Liu et al. 2025, Appendix A.4).

Use the commands of that file, with settings that fit this size (docs/scaling.md):

  --config.mesh.fsdp=16 --config.train.accumulation=4 --topology=v5p:4x4x4
"""

from ml_collections import ConfigDict

from configs import gemma2_2b


def get_config() -> ConfigDict:
    return gemma2_2b.get_config("gemma2_9b")
