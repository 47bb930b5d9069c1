"""A config's meaning before anything runs: the checked experiment, its record, its plan, its
metrics.
"""
