"""Turns a config into a job: the checked experiment, its record, its plan and its metrics."""
