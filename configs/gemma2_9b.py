"""Gemma 2 9B in the setting of gemma2_2b.py (Liu et al. 2025, Appendix A.4); the same commands."""

from ml_collections import ConfigDict

from configs import gemma2_2b


def get_config() -> ConfigDict:
    return gemma2_2b.get_config("gemma2_9b")
