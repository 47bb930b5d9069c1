#!/usr/bin/env bash
# Goes from nothing to a trained coprocessor and its perplexity table. Arguments, --config.KEY=VALUE, go to prepare,
# train and evaluate. Run again, it goes on where it stopped.
#
#   ./launch/quickstart.sh
#   RUN=runs/after ./launch/quickstart.sh --config.method.placement=after    # another run, on the same tokens
#   CONFIG=X ./launch/quickstart.sh                                          # configs/X.py, under runs/X
#   FROZEN=1 ./launch/quickstart.sh                                          # evaluates the plain decoder as well
#
# With FROZEN=1 the plain decoder's table is in RUN/frozen. Its evaluation gets only prompt_end of the keys of method.
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
overrides "$@"

config=configs/${CONFIG:=quickstart}.py
run=${RUN:-runs/$CONFIG}
tokens=runs/$CONFIG/tokens
[[ "$*" != *--config.data.* ]] || tokens=$run/tokens # of a text of its own
[[ -e $config ]] || die "CONFIG=$CONFIG: there is no $config"

step() { # NAME ARGUMENT...: runs a command of latent_delib, and says how long it took
  local start=$SECONDS
  echo "== $1"
  .venv/bin/python -m "latent_delib.$1" "${@:2}"
  echo "-- $1: $((SECONDS - start)) s"
}

./launch/setup.sh report
if [[ ! -e $tokens/meta.json ]]; then
  step prepare --config="$config" --out="$tokens" "$@" # which refuses a wrong key or value before it begins
else
  echo "== $tokens is there already, and is used as it is: remove it if its text has changed"
fi
step train --config="$config" --workdir="$run" --config.data.token_files="$tokens" "$@"
if [[ -n ${FROZEN:-} ]]; then
  shared=() # what is not of the method alone
  for argument; do
    [[ $argument == --config.method.!(prompt_end=*) ]] || shared+=("$argument")
  done
  step evaluate --config="$config" --workdir="$run/frozen" --config.data.token_files="$tokens" "${shared[@]}" \
    --config.method.name=decoder
fi
step evaluate --workdir="$run" "$@"
if [[ $CONFIG == quickstart && $# == 0 ]]; then # beside it, the packaged coprocessor: trained for longer, on more text
  step evaluate --config="$config" --workdir=packaged --out="$run/packaged" --config.data.token_files="$tokens" \
    --config.method.num_latents=16
fi
step generate --workdir="$run" --prompt="${PROMPT:-It was a fine morning, and}" --max_new_tokens=48 \
  --temperature=0.7 --top_p=0.9
echo "done in $SECONDS s; perplexity.json, its plot, the metrics and the checkpoints are in $run"
