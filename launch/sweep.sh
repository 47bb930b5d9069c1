#!/usr/bin/env bash
# Trains every CONFIG with every combination of the values given to KEYs.
#
#   ./launch/sweep.sh NAME [--with=LAUNCHER] [--jobs=1] CONFIG[,CONFIG ...] [KEY=VALUE,VALUE ...] [-- ARGUMENTS OF train]
#   ./launch/sweep.sh latents configs/paper.py:lab/overlay_4,configs/paper.py:lab/overlay_8 seed=0,1
#   ./launch/sweep.sh placement configs/quickstart.py method.placement=after,overlay seed=0,1 \
#     -- --config.data.token_files=runs/quickstart/tokens
#
# A run is named after its settings; its output is in runs/NAME/RUN.log, its workdir beside it. Run again, finished ones
# are skipped and the others resume; failed ones are named at the end.
#
#   --with=LAUNCHER   words before the command: './launch/local.sh --processes=2 --'. An @ among them becomes the name
#                     of a slice of the run's own, and its workdir is gs://$LATENT_DELIB_BUCKET/NAME/RUN:
#                     './launch/tpu_vm.sh keep @ --accelerator=v5litepod-16 --spot --delete --'
#   --jobs=1          how many run at a time
#   --dry_run         prints the commands, one per line, and runs none
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
with='' jobs=1
parse "with jobs" "$@"
name=${REST[0]:-} folder=runs/${REST[0]:-} root=runs/${REST[0]:-}
[[ $name =~ ^[a-z][-a-z0-9]{0,24}$ ]] || die "'$name': expected a name of a-z, 0-9 and -; --help tells more"
[[ ${REST[1]:-} =~ \.py(:[^,]+)?$ ]] ||
  die "'${REST[1]:-}': expected a config, as configs/quickstart.py; --help tells more"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "--jobs=$jobs: expected 1 or more"
if [[ $with == *" @ "* ]]; then
  environment LATENT_DELIB_BUCKET "where the workdirs are, without gs://"
  root=gs://$LATENT_DELIB_BUCKET/$name
fi

# One line per run: the config and each key with a value, tabs between.
IFS=, read -ra runs <<<"${REST[1]}"
configs=("${runs[@]}") given=() # all values of all keys
for config in "${runs[@]}"; do
  [[ -f ${config%%:*} ]] || die "${config%%:*}: no such file"
done
for key in "${REST[@]:2}"; do
  [[ $key == ?*=* && $key != config.* ]] || die "$key: expected KEY=VALUE,VALUE, and a KEY such as train.steps"
  [[ ,${key#*=}, != *,,* ]] || die "$key: one of the values is empty"
  IFS=, read -ra values <<<"${key#*=}"
  grid=()
  for run in "${runs[@]}"; do
    for value in "${values[@]}"; do grid+=("$run"$'\t'"${key%%=*}=$value"); done
  done
  given+=("${values[@]/#/--config.${key%%=*}=}")
  runs=("${grid[@]}")
done

# The name and the command of each run. No $( ) once a run has started: a signal that arrives while bash 5.2 reads one
# ends the script with a syntax error, and the started runs go on.
names=() commands=() finished_commands=()
for line in "${runs[@]}"; do
  IFS=$'\t' read -ra settings <<<"$line"
  config=${settings[0]} settings=("${settings[@]:1}")
  run=$(basename "${config%%:*}" .py)${line#"${config%%:*}"}
  run=${run//$'\t'/,} run=${run//[^A-Za-z0-9.,=_-]/-}
  read -ra launcher <<<"${with/ @ / $name-$(cksum <<<"$run" | cut -d ' ' -f 1) }"
  names+=("$run")
  commands+=("$(quote "${launcher[@]}" python -m latent_delib.train --config="$config" --workdir="$root/$run" \
    "${settings[@]/#/--config.}" "${COMMAND[@]}")")
  finished_commands+=("$(cat "$folder/$run.done" 2>/dev/null || true)")
done

twice=$(printf '%s\n' "${names[@]}" | sort | uniq -d | head -n 1)
[[ ! $twice ]] || die "$twice: two runs of the grid have this name, and would share a folder"

# A wrong key or value is reported before anything runs, unless only the slices can read the configs.
for config in "${configs[@]}"; do
  [[ -x .venv/bin/python ]] || break
  .venv/bin/python -m latent_delib.train --list_keys --config="$config" "${given[@]}" "${COMMAND[@]}" >/dev/null || exit 1
done

declare -A running=() # process id -> run
finished=0 failed=() stopped=''
stop() { stopped=1 && { ((!${#running[@]})) || kill "${!running[@]}" || true; }; }
trap stop TERM INT

collect() { # waits until one of them has ended
  local ended code run
  wait_one "${!running[@]}"
  [[ -n $ended ]] || return 0
  run=${running[$ended]}
  unset "running[$ended]"
  say "$run ended with code $code"
  if ((code)); then
    failed+=("$run (code $code, $folder/$run.log)")
  else
    finished=$((finished + 1))
    mv "$folder/$run.started" "$folder/$run.done"
  fi
}

call mkdir -p "$folder"
for i in "${!names[@]}"; do
  run=${names[i]}
  if [[ ${finished_commands[i]} == "${commands[i]}" ]]; then
    say "$run is done already"
  elif [[ -n $dry_run ]]; then
    echo "${commands[i]}"
  else
    while ((${#running[@]} >= jobs)); do collect; done
    [[ -z $stopped ]] || break
    say "$run: starts"
    echo "${commands[i]}" >"$folder/$run.started"
    eval "exec ${commands[i]}" >>"$folder/$run.log" 2>&1 </dev/null 3>&- &
    running[$!]=$run
    [[ -z $stopped ]] || stop # the signal came before its number was noted
  fi
done
while ((${#running[@]})); do collect; done
say "$finished finished, ${#failed[@]} failed of ${#runs[@]}"
((!${#failed[@]})) || die "failed: $(printf '%s; ' "${failed[@]}")the same command tries them again"
