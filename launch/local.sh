#!/usr/bin/env bash
# Runs N processes on this machine, as on N hosts, each with D simulated devices of the CPU.
#
#   ./launch/local.sh --processes=2 --devices=4 -- python -m latent_delib.train --config=... --workdir=...
#
# Adds --distributed to the command. Every line of output begins with its process's number. SIGTERM and SIGINT go to all
# processes. When one dies, the others are stopped and all start again, but not after codes 1, 126 and 127, the user's
# mistakes. Exits with the first code of a process that was not 0.
#
#   --restarts=3   how often all may start again
#   --grace=30     seconds between SIGTERM and SIGKILL for the others when one has died
#   --dry_run      prints the commands, one per line, and runs none
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
processes='' devices=1 restarts=3 grace=30
parse "processes devices restarts grace" "$@"
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ && ${#REST[@]} == 0 ]] ||
  die "expected --processes=N [--devices=D] -- COMMAND; --help tells more"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "--restarts=$restarts: expected 0 or more"
[[ $grace =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--grace=$grace: expected seconds"
job local
shared=(env PYTHONUNBUFFERED=1 JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_CPU_DEVICES="$devices"
  JAX_NUM_PROCESSES="$processes")
declare -A running=() # process id -> number
stopped=''            # the signal that came
pipe=$(mktemp -u)     # from a process to what numbers its lines
set -m                # each process in a group of its own: a Ctrl-C reaches it through this script alone

send() {
  local group
  for group in "${!running[@]}"; do kill "-$1" -- "-$group" 2>/dev/null || true; done
}
trap 'stopped=TERM; send TERM' TERM
trap 'stopped=INT; send INT' INT
# From here on no $( ) and no >( ): a signal that arrives while bash 5.2 reads one ends the script with a syntax error.

free_port() { # sets `port`, below the ports that the system hands out
  for _ in {1..100}; do
    port=$((10000 + RANDOM % 20000))
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
}

# Starts every process and waits for all. Returns the first code that is not 0.
attempt() {
  local first=0 printers=() port timer='' i out command ended code
  port=${dry_run:+PORT}
  [[ -n $port ]] || free_port
  for ((i = 0; i < processes; i++)); do
    command=("${shared[@]}" JAX_PROCESS_ID="$i" JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" "${COMMAND[@]}")
    [[ -z $dry_run ]] || { call "${command[@]}" && continue; }
    mkfifo "$pipe"
    (trap '' INT TERM && exec sed -u "s/^/[$i] /" <"$pipe") &
    printers+=($!)
    exec {out}>"$pipe"
    rm "$pipe"
    "${command[@]}" >&"$out" 2>&1 </dev/null 3>&- &
    running[$!]=$i
    exec {out}>&-
  done
  [[ -z $stopped ]] || send "$stopped"
  while ((${#running[@]})); do
    wait_one "${!running[@]}"
    [[ -n $ended ]] || continue
    say "process ${running[$ended]} ended with code $code"
    kill -KILL -- "-$ended" 2>/dev/null || true # what it has left behind
    unset "running[$ended]"
    if ((code && !first)); then
      first=$code
      [[ -n $stopped ]] || send TERM
      { sleep "$grace" && send KILL; } 3>&- &
      timer=$!
      disown
    fi
  done
  [[ -z $timer ]] || kill -KILL -- "-$timer" 2>/dev/null || true
  wait "${printers[@]}"
  return "$first"
}

for ((n = 1; ; n++)); do
  code=0
  attempt || code=$?
  case $code in
    0 | 1 | 126 | 127) exit "$code" ;;
  esac
  [[ -z $stopped ]] || exit "$code"
  ((n <= restarts)) || { say "== giving up after $restarts restarts; the last ended with code $code" && exit "$code"; }
  say "== STARTING AGAIN, $n of $restarts: a process ended with code $code"
done
