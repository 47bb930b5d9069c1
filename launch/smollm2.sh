#!/usr/bin/env bash
# A real pretrained decoder: fetches and converts SmolLM2-135M, evaluates it frozen, then does what quickstart.sh does for
# the packaged one. Arguments, --config.KEY=VALUE, go to prepare, train and
# evaluate; run again, it goes on where it stopped.
#
#   LATENT_DELIB_EXTRAS=cuda ./launch/gpu.sh ./launch/smollm2.sh    # on one GPU
#   CONFIG=smollm2_135m_cpu ./launch/smollm2.sh                     # the smallest form, on two CPU cores
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
overrides "$@"

export CONFIG=${CONFIG:-smollm2_135m} PROMPT="The capital of France is"
decoder=runs/smollm2_135m/decoder
run=runs/$CONFIG
[[ -e configs/$CONFIG.py ]] || die "CONFIG=$CONFIG: there is no configs/$CONFIG.py"

./launch/setup.sh
if [[ ! -e $decoder ]]; then
  gguf=$(./launch/get_smollm2.sh)
  .venv/bin/python -m latent_delib.convert --source="$gguf" --out=$decoder --size=smollm2_135m
fi
if [[ ! -e $run/tokens ]]; then
  .venv/bin/python -m latent_delib.prepare --config="configs/$CONFIG.py" --out="$run/tokens" "$@"
fi
if [[ ! -e $run/frozen/perplexity.json ]]; then
  .venv/bin/python -m latent_delib.evaluate --config="configs/$CONFIG.py" --workdir="$run/frozen" \
    --config.data.token_files="$run/tokens" --config.method.name=decoder
fi
exec ./launch/quickstart.sh "$@"
