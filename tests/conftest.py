"""Runs before any test module: eight CPU devices, no fight over the cores, absl's flags parsed."""

import os
import sys

from absl import flags

assert "jax" not in sys.modules, "XLA reads its flags once: nothing may import jax before this file"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
xla_flags = ["--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores among themselves
    os.environ["OMP_NUM_THREADS"] = "1"
    xla_flags.append("--xla_cpu_multi_thread_eigen=false")
os.environ["XLA_FLAGS"] = " ".join(filter(None, xla_flags))

flags.FLAGS(["pytest"])  # seqio reads absl's flags and raises where nobody has parsed them
