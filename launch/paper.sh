#!/usr/bin/env bash
# Trains and evaluates experiments of configs/paper, and makes the report over all that are there. Run again, it goes on
# where it stopped; what is done is not done again.
#
#   ./launch/paper.sh                        all of Protocol A, seed 0: a night on two CPU cores
#   ./launch/paper.sh a_overlay a_after@1    some; @1 is another seed
#   ./launch/paper.sh a_overlay -- --config.train.steps=20    more arguments for train and evaluate
#
# Runs lie in runs/paper/NAME@SEED: of the placements also swap/ (every text is given the latents of another), delay1/ to
# delay3/ (latents come late), and evaluations/ (every checkpoint).
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

experiments=()
while (($#)) && [[ $1 != -- ]]; do
  [[ -e configs/paper/${1%@*}.py ]] || { echo "error: $1: configs/paper has $(ls configs/paper)" >&2 && exit 1; }
  experiments+=("$1")
  shift
done
more=("${@:2}")
if ((!${#experiments[@]})); then
  for file in configs/paper/a_*.py; do experiments+=("$(basename "$file" .py)"); done
fi

latent_delib() { echo "== $*" && .venv/bin/python -m "latent_delib.$1" "${@:2}"; }

evaluate() { # OUT, then what goes to the command; what is there already stays
  [[ -e $1/perplexity.json ]] || latent_delib evaluate --config="$config" --workdir="$run" --out="$1" "${@:2}" "${more[@]}"
}

# Without an accelerator: one device a core, each with half the batch. XLA runs much of a CPU program on one thread.
export XLA_FLAGS="--xla_force_host_platform_device_count=2 ${XLA_FLAGS:-}"

./launch/setup.sh
if [[ ! -e runs/paper/tokens/meta.json ]]; then
  latent_delib prepare --config=configs/paper/protocol_a.py --config.data.token_files= --out=runs/paper/tokens
fi
for experiment in "${experiments[@]}"; do
  [[ $experiment == *@* ]] && seed=${experiment#*@} || seed=0
  config=configs/paper/${experiment%@*}.py run=runs/paper/${experiment%@*}@$seed
  [[ -e $run/perplexity.json ]] || latent_delib train --config="$config" --workdir="$run" --config.seed="$seed" "${more[@]}"
  evaluate "$run" --config.seed="$seed"
  if [[ ${experiment%@*} == a_overlay || ${experiment%@*} == a_after ]]; then
    evaluate "$run/swap" --config.seed="$seed" --config.evaluate.swap
    for delay in 1 2 3; do evaluate "$run/delay$delay" --config.seed="$seed" --config.evaluate.delay="$delay"; done
    latent_delib evaluate --config="$config" --workdir="$run" --config.seed="$seed" --steps=all "${more[@]}"
  elif [[ ${experiment%@*} == a_delay ]]; then
    for delay in 1 2 3; do evaluate "$run/delay$delay" --config.seed="$seed" --config.evaluate.delay="$delay"; done
  fi
done
latent_delib report runs/paper --out=runs/paper/report
