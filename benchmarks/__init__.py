"""Measures speed and memory, each form beside a plain one: `python -m benchmarks.NAME --help`."""
