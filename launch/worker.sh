#!/usr/bin/env bash
# Runs the job on one worker of a slice; tpu_vm.sh calls this on all of them, over ssh.
#
#   worker.sh setup            makes .venv, with a Python from uv if the machine has none that fits;
#                              adds only the extras in $LATENT_DELIB_EXTRAS, so no TensorFlow
#   worker.sh start COMMAND    detached from the ssh session; its log, process id and exit code stay in runs/job
#   worker.sh status           WORKER, then none, running, `exit CODE TIME`, or lost (it ended without a code: a reboot)
#   worker.sh logs             the end of the log, and what follows until the job ends
#   worker.sh idle             fails while a job runs
#   worker.sh stop             SIGTERM, which saves; SIGKILL after 120 s
set -euo pipefail
[[ ${1:-} != --help && ${1:-} != -h ]] || exec "$(dirname "$(readlink -f "$0")")/common.sh" "$(readlink -f "$0")"
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
worker=${SLICE:+$SLICE.}${HOSTNAME##*-w-} job=runs/job
mkdir -p $job

# The job's supervisor holds the lock: a process id may be another process's after a reboot.
running() { ! flock --nonblock $job/lock true; }
busy() { echo "error: another job runs here: $(<$job/command)" >&2 && exit 1; }
signal() { kill "-$1" -- "-$(<$job/pid)" 2>/dev/null || true; }

case ${1:-} in
  setup)
    with_uv() {
      curl -LsSf https://astral.sh/uv/0.13.9/install.sh | sh
      PATH=~/.local/bin:$PATH
      uv python install 3.12
      PYTHON=$(uv python find --managed-python --no-project 3.12) ./launch/setup.sh base
    }
    { ./launch/setup.sh base || with_uv; } >$job/setup.log 2>&1 || { tail -n 5 $job/setup.log >&2 && exit 1; }
    echo "$worker $(tail -n 1 $job/setup.log)"
    ;;
  start)
    command=$(printf '%q ' "${@:2}")
    exec 9>>$job/lock
    if ! flock --nonblock 9; then
      [[ $command == "$(<$job/command)" ]] || busy
      echo "$worker runs it already" && exit
    fi
    rm -f $job/{exit,pid}
    if [[ -e /dev/vfio/0 || -e /dev/accel0 ]]; then # on a TPU jax asks for it, to start faster; a reboot undoes it
      echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null || true
    fi
    echo "$command" >$job/command
    echo "== $(date -Is) $command" >>$job/log
    setsid ./launch/worker.sh supervise "${@:2}" >>$job/log 2>&1 </dev/null &
    until [[ -s $job/pid ]]; do sleep 0.05; done
    echo "$worker started"
    ;;
  supervise)
    trap : TERM INT HUP # the whole group gets a signal; this shell lives on to write down the code
    echo $$ >$job/pid
    code=0
    PYTHONUNBUFFERED=1 PATH=$PWD/.venv/bin:$PATH "${@:2}" 9>&- || code=$?
    echo "exit $code $EPOCHREALTIME" >$job/exit.tmp # no $( ) under a trap: see sweep.sh
    mv $job/exit.tmp $job/exit
    ;;
  status)
    if [[ ! -e $job/command ]]; then
      echo "$worker none"
    elif running; then
      echo "$worker running"
    else
      echo "$worker $(cat $job/exit 2>/dev/null || echo lost)"
    fi
    ;;
  logs)
    [[ -s $job/pid ]] || { echo "error: no job has run here" >&2 && exit 1; }
    tail -n 20 --pid="$(<$job/pid)" -F $job/log | sed -u "s/^/[$worker] /"
    ;;
  idle) ! running || busy ;;
  stop)
    for seconds in 1 10 30 80; do # again, because a job that is only just starting may miss it
      running || exit 0
      signal TERM
      ! flock --timeout $seconds $job/lock true || exit 0
    done
    signal KILL
    ;;
  *) echo "error: no action '${1:-}'; --help has them all" >&2 && exit 1 ;;
esac
