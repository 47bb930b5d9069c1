"""The benchmarks of tools.make_problems, for `benchmark --table=configs/problems.py`.

The tables have the form of configs/benchmarks.py.
"""

PUBLISHED: dict = {}
NAMES = ("sums", "sorting", "look_ups", "brackets", *(f"follow_{steps}" for steps in range(1, 7)))
OFFLINE = {name: {"shots": 0, "metric": "exact_match"} for name in NAMES}
COT = ""
