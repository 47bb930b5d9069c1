#!/usr/bin/env bash
# Holds what the launch scripts share; they source it. Goes to the repository's root and puts .venv's python first on
# PATH.
#
#   LATENT_DELIB_RETRIES=8    how often a call of gcloud or xpk is tried before it counts as failed
#   LATENT_DELIB_WAIT=10      seconds before the second try; doubled each time, at most 300
#   LATENT_DELIB_POLL=60      seconds between two looks at a slice or a job
set -euo pipefail
self=$(readlink -f "$0") script=${0##*/}
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
export PATH=$PWD/.venv/bin:$PATH
exec 3>&1 # where dry runs print, from inside $( ) too

RETRIES=${LATENT_DELIB_RETRIES:-8}
REST=() COMMAND=() dry_run=
# What trying again does not cure. A quota "per minute" is a rate: that one passes.
HOPELESS='PERMISSION_DENIED|INVALID_ARGUMENT|RESOURCE_EXHAUSTED|[Qq]uota|unrecognized arguments|gcloud auth login'
HOPELESS+='|not present in the SSH agent|another job runs here|worker.sh: No such file'

say() { [[ -n $dry_run ]] || echo "${script%.sh}: $*" >&2; }
die() { echo "error: $*" >&2 && exit 1; }
quote() { local line && printf -v line ' %q' "$@" && echo "${line:1}"; }
call() { if [[ -n $dry_run ]]; then quote "$@" >&3; else "$@"; fi; }
pause() { [[ -n $dry_run ]] || sleep "${LATENT_DELIB_POLL:-60}"; }

# Prints the head of the script, and ends.
usage() { sed -nE '/^# shellcheck/d; 2,/^[^#]/s/^# ?//p' "$self" && exit; }

# parse "FLAG ..." "$@": gives each --flag=value to the variable of that name (--flag alone: 1), words to REST, and all
# that follows -- to COMMAND. --help prints the head of the script.
parse() {
  local allowed=" $1 dry_run" flag
  while shift && (($#)); do
    flag=${1#--} flag=${flag%%=*}
    case $1 in
      --) COMMAND=("${@:2}") && return ;;
      --help | -h) usage ;;
      --delete=* | --dry_run=* | --reserved=* | --spot=*) die "$1: takes no value; leave it out" ;;
      --*=*) [[ "$allowed " == *" $flag "* ]] && printf -v "$flag" %s "${1#*=}" ;;
      --*) [[ "$allowed " == *" $flag "* ]] && printf -v "$flag" 1 ;;
      *) REST+=("$1") ;;
    esac || die "$1: no such flag; there are${allowed// / --}"
  done
}

# overrides "$@": refuses all but changes of the config, which prepare, train and evaluate take.
overrides() {
  local argument
  for argument; do
    case $argument in
      --help | -h) usage ;;
      --config.?*) ;;
      *) die "$argument: expected --config.KEY=VALUE; --help tells more" ;;
    esac
  done
}

# wait_one PID...: waits until one of these children has ended. Sets `ended`, empty where a signal ended the wait, and
# `code`. `wait -n` alone never reports a child that was killed while bash ran another command.
# shellcheck disable=SC2034 # the callers read them
wait_one() {
  code=0
  for ended in "$@"; do
    kill -0 "$ended" 2>/dev/null || { wait "$ended" 2>/dev/null || code=$? && return; }
  done
  ended=''
  wait -n -p ended "$@" 2>/dev/null || code=$?
  ended=${ended:-}
}

# environment NAME MEANING: requires a variable. Its value is never written into a file of the repository.
environment() { [[ -n ${!1:-} ]] || die "$1 is not set in the environment: $2"; }

installed() { [[ -n $dry_run ]] || command -v "$1" >/dev/null || die "$1 is not on PATH: $2"; }

# retry COMMAND...: tries until the command succeeds, and prints its stdout. Its stderr is shown only as the reason for
# another try or for giving up. Returns 3 where trying again is hopeless; and without a message 4 where something is not
# found, or is a slice that was preempted ("terminal state"), 5 where it exists already.
retry() {
  local try pause=${LATENT_DELIB_WAIT:-10} errors reason code
  for ((try = 1; ; try++)); do
    if [[ -n $dry_run ]]; then call "$@" && return; fi
    { errors=$("$@" 2>&1 >&4 4>&-); } 4>&1 && return # 4 is our stdout; $( ) gets the stderr
    [[ ! $errors =~ NOT_FOUND|"was not found"|"terminal state" ]] || return 4
    [[ $errors != *ALREADY_EXISTS* ]] || return 5
    reason=$(grep -im 1 error <<<"$errors" || tail -n 1 <<<"$errors")
    code=1
    [[ ! $errors =~ $HOPELESS || $errors == *"per minute"* ]] || code=3
    if ((code == 3 || try >= RETRIES)); then
      say "gave up at try $try: $reason"
      return "$code"
    fi
    say "try $try of $RETRIES failed, the next in $pause s: $reason"
    sleep "$pause"
    pause=$((pause * 2 < 300 ? pause * 2 : 300))
  done
}

# job local|slice: makes COMMAND one of many processes. On a slice all must see its workdir, which must outlive them; what
# they compile stays in its bucket, for the next start.
job() {
  ((${#COMMAND[@]})) || die "no command: ... -- python -m latent_delib.train --config=... --workdir=..."
  local argument bucket cache=()
  for argument in "${COMMAND[@]}"; do
    [[ $1 != slice || $argument != --workdir ]] || die "--workdir: expected --workdir=gs://... in one word"
    [[ $1 == slice && $argument == --workdir=* ]] || continue
    [[ $argument == --workdir=gs://* ]] ||
      die "$argument: a slice's disks are not shared and are lost with it; expected gs://..."
    bucket=${argument#--workdir=gs://}
    cache=(env JAX_COMPILATION_CACHE_DIR="gs://${bucket%%/*}/compiled")
  done
  COMMAND=("${cache[@]}" "${COMMAND[@]}" --distributed)
}

# pack NAME: packs this folder, without what is built or written here and without stored results, as
# runs/launch/NAME/code.tar.gz.
pack() {
  call mkdir -p "runs/launch/$1"
  call tar -czf "runs/launch/$1/code.tar.gz" --exclude=./.git --exclude=./.venv --exclude=./runs \
    --exclude=./docs/results --exclude=__pycache__ --exclude='.*_cache' .
}

# Called by itself, it prints the head of the script that it is given: some scripts need no more of it.
if [[ $script == common.sh ]]; then
  [[ ! -f ${1:-} ]] || self=$1
  usage
fi
