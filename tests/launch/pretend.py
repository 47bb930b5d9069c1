"""Programs that only pretend, and a cloud of them.

The pretended slice has two workers, each a folder, in which commands given over ssh run for real.
Two slices have one each: a slice NAME-0 the first, NAME-1 the second.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("common", "worker", "tpu_vm", "gke_xpk")

# Looks at the queued resource take a line of `states` each; the last one stays. A line STATE
# deleted or STATE started waits until the slice was deleted, or a job has started on both workers.
# `failures` has lines PATTERN|MESSAGE: the first call in which PATTERN is found, or ssh to a
# worker, fails, and the line is gone.
FAKE_GCLOUD = r"""#!/usr/bin/env bash
all="$*"
{ printf '%q ' "${@:1:$#-1}" && printf '%q\n' "${@: -1}"; } >>"$WORLD/calls"
[[ ! -e $WORLD/hook ]] || source "$WORLD/hook"
IFS='|' read -r pattern message <"$WORLD/failures"
passed() {
  [[ -z $1 || -e $WORLD/$1 || $1 == started && -e $WORLD/started-0 && -e $WORLD/started-1 ]]
}
workers() { # of a slice
  local slice=${1%:}
  if [[ $slice =~ -[01]$ ]]; then echo "$WORLD/worker-${slice##*-}"; else echo "$WORLD"/worker-*; fi
}
failing() { [[ -n $pattern && $1 =~ $pattern ]] && sed -i 1d "$WORLD/failures"; }
wipe() {
  local worker pid
  for worker in "$WORLD"/worker-*; do
    pid=$worker/latent_delib/runs/job/pid
    [[ ! -e $pid ]] || kill -KILL -- "-$(<"$pid")" 2>/dev/null
    rm -rf "${worker:?}"/*
  done
}
case $all in
  *"--worker=all --quiet --command="*) ;; # may fail on a worker
  *) if failing "$all"; then echo "ERROR: (gcloud) $message" >&2 && exit 1; fi ;;
esac
case $all in
  *"queued-resources describe"*failedData*) echo "out of luck" ;;
  *"queued-resources describe"*)
    if [[ -e $WORLD/looked ]] &&
      read -r _ event < <(sed -n 2p "$WORLD/states") && passed "$event"; then
      sed -i 1d "$WORLD/states"
    fi
    touch "$WORLD/looked"
    read -r state _ <"$WORLD/states"
    case $state in
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2 && exit 1 ;;
      SUSPENDED) wipe ;;
    esac
    printf '%s\tv5litepod-16\n' "$state"
    ;;
  *"queued-resources create"*) ;;
  *"queued-resources delete"*) wipe && touch "$WORLD/deleted" ;;
  *"tpu-vm describe"*) cat "$WORLD/node" ;;
  *"tpu-vm scp"*) for worker in $(workers "$6"); do cp "$5" "$worker/"; done ;;
  *"tpu-vm ssh"*)
    code=0
    for worker in $(workers "$5"); do
      if failing "${worker##*/} $all"; then
        echo "ERROR: (gcloud) $message" >&2
        code=255
        continue
      fi
      export HOME=$worker HOSTNAME=t1v-n-0-w-${worker##*-}
      (cd "$HOME" && exec bash -c "${all##*--command=}" 3>&- 4>&-) || code=$?
    done
    exit "$code"
    ;;
  *) echo "ERROR: (gcloud) unrecognized arguments" >&2 && exit 2 ;;
esac
"""

# Every start takes a line of the worker's `ends`: a code; `later CODE`, when the other has ended;
# or `hang`, until SIGTERM, and then 75. Like a real job it first waits for the other worker.
FAKE_PYTHON = r"""#!/usr/bin/env bash
me=$(cd .. && pwd) && me=${me##*-}
read -r end <"$WORLD/ends-$me" && sed -i 1d "$WORLD/ends-$me"
echo "this start ends with $end"
echo "$*" >>"$WORLD/started-$me"
starts() { cat "$WORLD/started-$1" 2>/dev/null | wc -l; }
other=$((1 - me))
until (($(starts $other) >= $(starts "$me"))); do sleep 0.02; done
if [[ $end == later* ]]; then
  until [[ -e $WORLD/worker-$other/latent_delib/runs/job/exit ]]; do sleep 0.02; done
fi
if [[ $end == hang ]]; then
  trap 'kill $!; exit 75' TERM
  sleep 60 >/dev/null &
  wait
fi
exit "${end#later }"
"""

FAKE_SETUP = r"""#!/usr/bin/env bash
mkdir -p .venv/bin && cp "$WORLD/python" .venv/bin/python && echo "ready, $* $LATENT_DELIB_EXTRAS"
"""

FAKE_XPK = r"""#!/usr/bin/env bash
{ printf '%q ' "${@:1:$#-1}" && printf '%q\n' "${@: -1}"; } >>"$WORLD/calls"
all="$*"
[[ ! -e $WORLD/hook ]] || source "$WORLD/hook"
case $all in
  *wait-for-job-completion*)
    read -r code <"$WORLD/waits" && sed -i 1d "$WORLD/waits" && exit "$code"
    ;;
  *filter-by-status=*) cat "$WORLD/listed-${all##*filter-by-status=}" 2>/dev/null || true ;;
esac
"""

TRAIN = (
    "python",
    "-m",
    "latent_delib.train",
    "--config=configs/x.py",
    "--workdir=gs://bucket/a run",
)
QUOTED = "env JAX_COMPILATION_CACHE_DIR=gs://bucket/compiled "
QUOTED += r"python -m latent_delib.train --config=configs/x.py --workdir=gs://bucket/a\ run"
STARTED = "-m latent_delib.train --config=configs/x.py --workdir=gs://bucket/a run --distributed"
AT = "--project=project --zone=zone"
STATE = f"gcloud compute tpus queued-resources describe a {AT} "
STATE += r"--format=value\(state.state\,tpu.nodeSpec\[0\].node.acceleratorType\)"
CREATE = (
    f"gcloud compute tpus queued-resources create a {AT} --node-id=a "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot --async --quiet"
)
DELETE = f"gcloud compute tpus queued-resources delete a {AT} --force --quiet"
SSH = f"gcloud compute tpus tpu-vm ssh a {AT} --worker=all --quiet".split()
XPK_AT = "--cluster=cluster --project=project --zone=zone"


def program(path: Path, text: str) -> Path:
    """Writes a program: a bash script, unless its first line says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


class World:
    """A checkout with the launch scripts alone, and the cloud they see."""

    def __init__(self, root: Path):
        self.root, self.world = root / "repo", root / "world"
        for folder in (self.root / "launch", self.root / "configs", self.world / "bin"):
            folder.mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(ROOT / "launch" / f"{name}.sh", self.root / "launch")
        program(self.root / "launch/setup.sh", FAKE_SETUP)
        program(self.world / "python", FAKE_PYTHON)
        program(self.world / "bin/gcloud", FAKE_GCLOUD)
        program(self.world / "bin/xpk", FAKE_XPK)
        program(self.world / "bin/kubectl", FAKE_XPK)
        program(self.world / "bin/docker", FAKE_XPK)
        self.plays(states=["ACTIVE"], failures=[], node=["READY"])
        for worker in (0, 1):
            (self.world / f"worker-{worker}").mkdir()
            self.plays(**{f"ends-{worker}": ["0"] * 9})
        self.env = {
            "PATH": f"{self.world}/bin:{os.defpath}",
            "WORLD": str(self.world),
            "HOME": str(root),
            "LATENT_DELIB_PROJECT": "project",
            "LATENT_DELIB_ZONE": "zone",
            "LATENT_DELIB_CLUSTER": "cluster",
            "LATENT_DELIB_WAIT": "0",
            "LATENT_DELIB_POLL": "0",
            "LATENT_DELIB_RETRIES": "3",
        }

    def plays(self, **files: list[str]) -> None:
        if "states" in files:
            (self.world / "looked").unlink(missing_ok=True)
        for name, lines in files.items():
            (self.world / name).write_text("".join(line + "\n" for line in lines))

    def launch(self, script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        command = [self.root / "launch" / f"{script}.sh", *arguments]
        done = subprocess.run(
            command, cwd="/", env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def keep(
        self, *flags: str, command: tuple[str, ...] = TRAIN, code: int = 0
    ) -> subprocess.CompletedProcess:
        return self.launch(
            "tpu_vm", "keep", "a", "--accelerator=v5litepod-16", *flags, "--", *command, code=code
        )

    def calls(self, part: str = "") -> list[str]:
        log = self.world / "calls"
        return (
            [line for line in log.read_text().splitlines() if part in line] if log.exists() else []
        )

    def started(self, times: int) -> None:
        """The command ran so often on both workers, the same; the last start may be on its way."""
        logs, end = [self.world / f"started-{worker}" for worker in (0, 1)], time.monotonic() + 20
        while not all(log.exists() and log.read_text().count("\n") >= times for log in logs):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert [log.read_text().splitlines() for log in logs] == [[STARTED] * times] * 2
