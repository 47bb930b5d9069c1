"""The benchmarks of tools.make_problems, for `benchmark --table=configs/problems.py`.

The tables have the form of configs/benchmarks.py.
"""

PUBLISHED: dict = {}
OFFLINE = {
    "sums": {"task": "sums", "shots": 0, "metric": "exact_match"},
    "sorting": {"task": "sorting", "shots": 0, "metric": "exact_match"},
    "look_ups": {"task": "look_ups", "shots": 0, "metric": "exact_match"},
    "brackets": {"task": "brackets", "shots": 0, "metric": "exact_match"},
    "follow_1": {"task": "follow_1", "shots": 0, "metric": "exact_match"},
    "follow_2": {"task": "follow_2", "shots": 0, "metric": "exact_match"},
    "follow_3": {"task": "follow_3", "shots": 0, "metric": "exact_match"},
    "follow_4": {"task": "follow_4", "shots": 0, "metric": "exact_match"},
    "follow_5": {"task": "follow_5", "shots": 0, "metric": "exact_match"},
    "follow_6": {"task": "follow_6", "shots": 0, "metric": "exact_match"},
}
COT = ""
