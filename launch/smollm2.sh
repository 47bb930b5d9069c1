#!/usr/bin/env bash
# Runs quickstart.sh with a real pretrained decoder: fetches and converts SmolLM2-135M, and evaluates it frozen as well.
# Arguments, --config.KEY=VALUE, go to prepare, train and evaluate. Run again, it goes on where it stopped.
#
#   LATENT_DELIB_EXTRAS=cuda ./launch/gpu.sh ./launch/smollm2.sh    # on one GPU
#   CONFIG=smollm2_135m_cpu ./launch/smollm2.sh                     # the smallest form, on two CPU cores
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
overrides "$@"

export CONFIG=${CONFIG:-smollm2_135m} PROMPT="The capital of France is" FROZEN=1
decoder=runs/smollm2_135m/decoder
[[ -e configs/$CONFIG.py ]] || die "CONFIG=$CONFIG: there is no configs/$CONFIG.py"

./launch/setup.sh gguf report
if [[ ! -e $decoder ]]; then
  gguf=$(./launch/get_smollm2.sh)
  .venv/bin/python -m latent_delib.convert --source="$gguf" --out=$decoder --size=smollm2_135m
fi
exec ./launch/quickstart.sh "$@"
