"""Speed and memory, every form beside a plain one: `python -m benchmarks.NAME --help`."""
