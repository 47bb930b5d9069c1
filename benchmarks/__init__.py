"""Speed and memory, every form beside a plain one. Run from the repository's root: python -m
benchmarks.NAME --help
"""
