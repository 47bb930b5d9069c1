#!/usr/bin/env bash
# Runs a job on all workers of a Cloud TPU VM slice, or several, which it asks for through queued resources.
#
#   ./launch/tpu_vm.sh create NAME --accelerator=v5litepod-16 [--spot]    asks for a slice, waits until it is ready
#   ./launch/tpu_vm.sh setup  NAME                           copies this folder to every worker, makes .venv there
#   ./launch/tpu_vm.sh run    NAME -- python -m latent_delib.train --config=... --workdir=gs://...
#   ./launch/tpu_vm.sh keep   NAME --accelerator=... [--spot] [--delete] -- python -m latent_delib.train ...
#   ./launch/tpu_vm.sh status NAME
#   ./launch/tpu_vm.sh logs   NAME [--worker=0]
#   ./launch/tpu_vm.sh stop   NAME                           SIGTERM to the job, which saves
#   ./launch/tpu_vm.sh delete NAME
#
# `run` adds --distributed and returns at once. `keep` does create, setup and run, then watches: a preempted slice is
# asked for again; a job that died or was stopped is started again, and resumes. It ends when the job is done, has failed
# with code 1, 126 or 127, or has died more than `--restarts` times. The job goes on without `keep`, and the same `keep`
# finds it again.
#
#   --accelerator=TYPE   v5litepod-N, v6e-N (chips), v4-N, v5p-N (cores, two per chip)
#   --slices=1           how many such slices work on one job; every action needs it again. mesh.data is a multiple of it
#   --spot               cheaper, but may be preempted; without it on demand
#   --reserved           uses a reservation
#   --flex_start=12h     asks for a slice for this long, 7d at most; `keep` asks again when it ends
#   --runtime=VERSION    the slice's image, where it is not the generation's usual one
#   --create_flags=...   more flags of `gcloud compute tpus queued-resources create`, such as --network=NAME
#   --fetch=gs://...     a folder that `setup` copies to every worker, into runs/: a decoder
#   --restarts=10        how often `keep` starts a dead job again; preemptions and code 75 do not count
#   --delete             `keep` deletes the slice when the job is done or has failed
#   --worker=all         the worker whose log is shown; with several slices, a worker of the first, which has process 0
#   --dry_run            prints the commands, one per line, and runs none
#
# Environment: LATENT_DELIB_PROJECT, LATENT_DELIB_ZONE; see also common.sh.
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
accelerator='' slices=1 spot='' reserved='' flex_start='' runtime='' create_flags='' fetch='' restarts=10 delete=''
worker=all
parse "accelerator slices spot reserved flex_start runtime create_flags fetch restarts delete worker" "$@"
action=${REST[0]:-} name=${REST[1]:-}
[[ " create setup run keep status logs stop delete " == *" $action "* ]] ||
  die "no action '$action'; --help has them all"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ && ${#REST[@]} == 2 ]] ||
  die "expected an action and a name of a-z, 0-9 and -, found '${REST[*]}'; --help tells more"
[[ ! $fetch || $fetch =~ ^gs://.+[^/]$ ]] || die "--fetch=$fetch: expected gs://BUCKET/.../FOLDER"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: expected 1 or more"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "--restarts=$restarts: expected 0 or more"
[[ ! $flex_start || $flex_start =~ ^[1-9][0-9]*[smhd]$ ]] || die "--flex_start=$flex_start: expected a time like 12h"
tiers=(${spot:+--spot} ${reserved:+--reserved} ${flex_start:+--flex_start})
((${#tiers[@]} < 2)) || die "${tiers[*]}: expected one of them"
environment LATENT_DELIB_PROJECT "the Google Cloud project"
environment LATENT_DELIB_ZONE "the zone of the slice, such as us-central1-a"
installed gcloud "https://cloud.google.com/sdk/docs/install"
tpus=(gcloud compute tpus) at=(--project="$LATENT_DELIB_PROJECT" --zone="$LATENT_DELIB_ZONE")
unseen="the state of $name cannot be seen; is gcloud logged in (gcloud auth login), and allowed to see"
unseen+=" $LATENT_DELIB_PROJECT? A job on $name goes on"
nodes=("$name") numbered=(--node-id="$name")
if ((slices > 1)); then
  mapfile -t nodes < <(seq -f "$name-%.0f" 0 $((slices - 1)))
  numbered=(--node-count="$slices" --node-prefix="$name")
fi
# known: `asked` or `seen`, the queued resource. had: set once one was seen. shown: the state printed last
known='' had='' shown=''

image() {
  if [[ -n $runtime && -n $accelerator ]]; then echo "$runtime" && return; fi
  case $accelerator in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) die "--accelerator=$accelerator: Google has TPU7x in GKE only (gke_xpk.sh); --runtime=VERSION asks anyway" ;;
    *) die "--accelerator=$accelerator: expected v4-N, v5litepod-N, v5p-N or v6e-N; others need --runtime=VERSION" ;;
  esac
}

# Runs a command for each slice, whose name is then in `node`.
each_slice() {
  local node
  for node in "${nodes[@]}"; do "$@" || return; done
}

describe() { retry "${tpus[@]}" queued-resources describe "$name" "${at[@]}" --format="value($1)"; }

# Prints ABSENT, ACTIVE (and its node is ready), PREEMPTED, another state of the queued resource or its node, or the type
# of a slice that is not the one asked for.
state() {
  local found type node
  found=$(describe 'state.state,tpu.nodeSpec[0].node.acceleratorType') || { (($? == 4)) && echo ABSENT; return; }
  read -r found type <<<"${found:-${known:-ABSENT}}" # a dry run finds nothing, then what it has asked for
  [[ -z $type || -z $accelerator || $type == "$accelerator" ]] || found=$type
  if [[ $found == ACTIVE || $found == asked ]]; then
    for node in "${nodes[@]}"; do
      found=$(retry "${tpus[@]}" tpu-vm describe "$node" "${at[@]}" --format='value(state)') ||
        { (($? == 4)) && echo PREEMPTED; return; }
      found=${found:-READY} found=${found/READY/ACTIVE} found=${found/TERMINATED/PREEMPTED}
      [[ $found == ACTIVE ]] || break
    done
  fi
  echo "$found"
}

# Asks for the slice unless it is there and waits until it is ready. Fails where that will not come.
create() {
  local now flags version ask=("${tpus[@]}")
  version=$(image) || exit 1
  read -ra flags <<<"$create_flags"
  [[ -z $flex_start ]] || ask=(gcloud alpha compute tpus) # where these flags are
  [[ -z $flex_start ]] || tiers=(--provisioning-model=flex-start --max-run-duration="$flex_start")
  while now=$(state); do
    if [[ $now != "$shown" ]]; then
      say "$name: $now"
      [[ $now != WAITING* ]] || say "no capacity yet; Ctrl-C leaves the request in its queue, the same command waits on"
    fi
    shown=$now
    case $now$known in
      v* | tpu*) die "$name exists already, as a $now" ;;
      ABSENTseen) die "$name is gone: somebody deleted it" ;;
      ABSENTasked) ;;
      ABSENT)
        retry "${ask[@]}" queued-resources create "$name" "${at[@]}" "${numbered[@]}" \
          --accelerator-type="$accelerator" --runtime-version="$version" "${tiers[@]}" "${flags[@]}" \
          --async --quiet ||
          (($? == 5)) || { [[ -n $had ]] && return 1; } ||
          die "$name is not granted; spot and on-demand chips have separate quotas, in each zone"
        known=asked
        ;;
      *) known=seen had=1 ;;
    esac
    case $now in
      ACTIVE) return ;;
      FAILED) say "$(describe state.failedData.error.message)" && return 1 ;;
      SUSPENDED | PREEMPTED) return 1 ;;
    esac
    pause
  done
  die "$unseen"
}

release() {
  retry "${tpus[@]}" queued-resources delete "$name" "${at[@]}" --force --quiet || (($? == 4)) ||
    die "$name is still there"
  known=''
}

on_slice() {
  local which=''
  ((slices == 1)) || which="export SLICE=${node##*-}; "
  retry "${tpus[@]}" tpu-vm ssh "$node" "${at[@]}" --worker=all --quiet --command="$which$1"
}
copy_to_slice() { retry "${tpus[@]}" tpu-vm scp "$1" "$node:" "${at[@]}" --worker=all --quiet; }
on_workers() { each_slice on_slice "$1"; }
start() { on_workers "latent_delib/launch/worker.sh start $(quote "${COMMAND[@]}")"; }
if_set_up() { on_workers "test ! -x latent_delib/launch/worker.sh && echo - none || latent_delib/launch/worker.sh $1"; }

# The first connection also makes an ssh key and spreads it, which a copy to many workers at once does not wait for.
setup() {
  local commands copy=runs/${fetch##*/} extras=tpu${LATENT_DELIB_EXTRAS:+,$LATENT_DELIB_EXTRAS}
  commands="mkdir -p latent_delib && cd latent_delib && rm -rf configs latent_delib launch && tar -xzf ../code.tar.gz"
  [[ -z $fetch ]] ||
    commands+=" && mkdir -p $(quote "$copy") && gcloud storage rsync --recursive $(quote "$fetch" "$copy")"
  if_set_up idle >/dev/null &&
    each_slice copy_to_slice "runs/launch/$name/code.tar.gz" &&
    on_workers "$commands && LATENT_DELIB_EXTRAS=$(quote "$extras") ./launch/worker.sh setup"
}

# Reads all workers' status; prints running, ending (some are done), done, or `ended CODE`, the first that was not 0.
verdict() {
  awk '$2 == "exit" && $3 && (code == "" || $4 < when) { code = $3; when = $4 }
    $2 == "exit" && !$3 { good++ }
    $2 == "none" || $2 == "lost" { gone++ }
    END {
      if (code != "") print "ended " code
      else print gone || !NR ? "ended lost" : !good ? "running" : good < NR ? "ending" : "done"
    }'
}

finish() { # CODE MESSAGE
  say "== $2"
  [[ -z $delete ]] || release
  exit "$1"
}

keep() {
  local started='' lost=0 silent=0 stuck=0 deaths=0 code now
  pack "$name"
  while true; do
    until create; do
      ((++lost < RETRIES)) || die "$lost slices in a row failed"
      say "== $name is lost: deleting it and asking for another"
      release
      started=''
      pause
    done
    lost=0

    code=0
    now=$(if_set_up status | verdict) || code=$?
    ((code != 3)) || die "$unseen" # for a cause on this side
    if ((code)); then
      ((++silent < 2)) && pause && continue
      [[ -n $started ]] || die "$name does not answer"
      say "== $name does not answer: deleting it and asking for another"
      release
      started='' silent=0
      continue
    fi
    silent=0
    if [[ -z $started && $now == running ]]; then # this very job, or an error
      start || die "$name is busy"
      started=1
    elif [[ -z $started && $now != ending ]]; then
      now="ended before" # whatever it was
    fi
    case $now in
      "done") finish 0 "the job on $name is done" ;;
      "ended 1" | "ended 126" | "ended 127")
        if_set_up stop || true # workers may be going
        on_workers "tail -n 20 latent_delib/runs/job/log" || true
        finish 1 "the job on $name failed with code ${now#ended }; not started again, its log has the reason"
        ;;
      ended*)
        if [[ -n $started ]]; then
          [[ $now == "ended 75" ]] || ((deaths++ < restarts)) || finish 1 "the job on $name died $deaths times"
          say "== the job on $name ended with ${now#ended }: starting it again"
        fi
        if if_set_up stop && setup && start; then
          started=1 stuck=0
        else
          ((++stuck < 2)) || die "$name is there, but the job does not start on it"
        fi
        ;;
    esac
    [[ -z $dry_run ]] || return 0
    pause
  done
}

case $action in
  create) create || die "$name failed; delete it before you ask again" ;;
  setup) pack "$name" && { setup || die "$name is not set up; is it there? Then the same command tries again"; } ;;
  run) job slice && { start || die "the job is not on every worker of $name; is $name set up? does another job run there?"; } ;;
  keep) job slice && keep ;;
  status)
    now=$(state) || die "$unseen"
    say "$name: $now"
    [[ $now != ACTIVE && -z $dry_run ]] || if_set_up status
    ;;
  logs)
    call "${tpus[@]}" tpu-vm ssh "${nodes[0]}" "${at[@]}" --worker="$worker" --quiet \
      --command="latent_delib/launch/worker.sh logs"
    ;;
  stop) if_set_up stop || die "$name does not answer; is it there? \`status\` tells" ;;
  delete) release ;;
esac
