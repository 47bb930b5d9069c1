#!/usr/bin/env bash
# Runs a command with the settings that NVIDIA GPUs want.
#
#   ./launch/setup.sh cuda seqio
#   ./launch/gpu.sh .venv/bin/python -m latent_delib.train --config=configs/gemma2_2b.py --workdir=DIR \
#       --config.decoder.path=DECODER --config.train.accumulation=256
#   ./launch/gpu.sh .venv/bin/python -m benchmarks.chip       # first on a new chip: docs/performance.md
#   ./launch/gpu.sh ./launch/smollm2.sh
#   CUDA_VISIBLE_DEVICES=3 XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 ./launch/gpu.sh ...     # half of one GPU of a shared machine
set -euo pipefail
[[ ${1:-} != --help && ${1:-} != -h ]] || exec "$(dirname "$(readlink -f "$0")")/common.sh" "$(readlink -f "$0")"
if [[ ! ${1:-} =~ ^[^-] ]]; then
  echo "error: ${1:-nothing to run}: expected a command; --help tells more" >&2
  exit 1
fi

nvidia-smi -L 2>/dev/null | grep -q GPU ||
  echo "warning: nvidia-smi shows no GPU: where jax finds none either, this runs on the CPU" >&2

# Stacking what the layers of a scan save makes XLA run their products twice, unless this fusion is off.
flags="--xla_gpu_enable_dynamic_slice_fusion=false --xla_gpu_enable_triton_gemm=false --xla_gpu_enable_command_buffer="
export XLA_FLAGS="$flags ${XLA_FLAGS:-}"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/latent_delib}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
exec "$@"
