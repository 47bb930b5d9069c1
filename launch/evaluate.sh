#!/usr/bin/env bash
# Evaluates every checkpoint of a training as it appears, on a machine or slice beside it.
#
#   ./launch/evaluate.sh --config=configs/X.py --workdir=DIR [--once] [-- MORE FLAGS OF evaluate]
#
# Results are in DIR/evaluations/STEP; steps that have them are skipped. DIR may be local or gs://. Ends when the step
# is evaluated that the checkpoint's own config calls the last, or when none has come for a long time.
#
#   --once            only those that are there now
#   --patience=86400  seconds without a new checkpoint after which the training counts as dead
#   --with=LAUNCHER   words before the command: './launch/tpu_vm.sh keep NAME --accelerator=v5litepod-8 --'
#   --dry_run         prints the commands, one a line, and runs none of them (but looks which checkpoints there are)
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
config='' workdir='' once='' patience=86400 with=''
parse "config workdir once patience with" "$@"
[[ -n $config && -n $workdir && ${#REST[@]} == 0 ]] || die "expected --config=FILE --workdir=DIR; --help tells more"
[[ $workdir != gs://* ]] || installed gcloud "https://cloud.google.com/sdk/docs/install"
read -ra launcher <<<"$with"

# The N with a file WORKDIR/$1/N/$2, smallest first.
numbers() {
  local look=(compgen -G)
  [[ $workdir != gs://* ]] || look=(gcloud storage ls)
  { "${look[@]}" "$workdir/$1/*/$2" 2>/dev/null || true; } | sed -nE "s|.*/([0-9]+)/$2\$|\1|p" | sort -n
}

# Of a whole checkpoint: on a local disk a folder takes its name once whole, in a bucket orbax adds a file at the end.
whole=meta/metadata
[[ $workdir != gs://* ]] || whole=commit_success.txt

# Whether step $1 is the last of its training.
last() {
  local meta=$workdir/checkpoints/$1/meta/metadata show=cat
  [[ $workdir != gs://* ]] || show="gcloud storage cat"
  $show "$meta" | python -c 'import json, sys
sys.exit(json.load(sys.stdin)["config"]["train"]["steps"] > int(sys.argv[1]))' "$1"
}

tried=' ' failed='' since=$SECONDS
while true; do
  done=" $(numbers evaluations perplexity.json | tr '\n' ' ')$tried"
  next='' newest=''
  for newest in $(numbers checkpoints $whole); do
    [[ -n $next || $done == *" $newest "* ]] || next=$newest
  done
  if [[ -n $next ]]; then
    call "${launcher[@]}" python -m latent_delib.evaluate --config="$config" --workdir="$workdir" --step="$next" \
      --out="$workdir/evaluations/$next" "${COMMAND[@]}" || failed+=" $next"
    tried+="$next " since=$SECONDS
  elif [[ -n $once || -n $dry_run ]]; then
    break
  elif [[ -n $newest ]] && last "$newest"; then
    say "step $newest was the last"
    break
  elif ((SECONDS - since >= patience)); then
    say "no checkpoint after ${newest:-the start} for $patience s"
    break
  else
    sleep "${LATENT_DELIB_POLL:-60}"
  fi
done
[[ -z $failed ]] || die "failed:$failed; the same command tries them again"
