#!/usr/bin/env bash
# Makes .venv in the repository's root: what setup.py asks for, in the versions of constraints.txt. Does nothing if
# that is done already, and starts again if it was cut short.
#
#   PYTHON=/opt/py312/bin/python   a Python 3.11 or 3.12 to try before those on PATH
#   LATENT_DELIB_EXTRAS=tpu        what to add: tpu, cuda, eval, mixture, reference, or several with commas between;
#                                  what an earlier call added stays
#
# `test` is always there, and `tasks` where Python can build extensions: PyPI has only the source of one of its parts.
set -euo pipefail
[[ ${1:-} != --help && ${1:-} != -h ]] || exec "$(dirname "$(readlink -f "$0")")/common.sh" "$(readlink -f "$0")"
if (($#)); then
  echo "error: $1: expected no arguments; --help tells more" >&2
  exit 1
fi
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

stamp=.venv/setup.stamp # what .venv was made from, or `unfinished`

if command -v flock >/dev/null; then # a second call at the same time waits, then finds the work done
  exec 9<setup.py
  flock --nonblock 9 || { echo "setup: waiting for another setup.sh" && flock 9; } || true
fi

# Each interpreter is asked by running it: a name on PATH may be a shim with nothing behind it. It answers with its base
# executable, because an environment cannot be replaced by the interpreter inside it, and with the extras it can have.
probe='
import os, shutil, sys, sysconfig
version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info[:2] not in ((3, 11), (3, 12)):
    print(version)
    sys.exit(1)
try:
    import ensurepip
except ImportError:
    print("%s without ensurepip (on Debian: apt-get install python%d.%d-venv)" % ((version,) + sys.version_info[:2]))
    sys.exit(1)
compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
builds = compiler and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print(version, sys._base_executable, "test,tasks" if builds else "test")
'
found=
for candidate in ${PYTHON:+"$PYTHON"} .venv/bin/python python3.12 python3.11 python3; do
  command -v "$candidate" >/dev/null || continue
  answer=$("$candidate" -c "$probe" 2>/dev/null) && break
  found+="${found:+, }$candidate is ${answer:-broken}"
  answer=
done
if [[ -z ${answer:-} ]]; then
  echo "error: Python 3.11 or 3.12 with ensurepip is needed, found: ${found:-none}; PYTHON=... names another" >&2
  exit 1
fi
read -r version executable default <<<"$answer"

have=$(cat $stamp 2>/dev/null || true)
extras="test"
[[ $have != "$version "* ]] || read -r _ extras _ <<<"$have"
for extra in $(tr , ' ' <<<"$default,${LATENT_DELIB_EXTRAS:-}"); do
  [[ ,$extras, == *",$extra,"* ]] || extras+=,$extra
done
want="$version $extras $PWD $(cat setup.py constraints.txt | cksum)"
usable() {
  [[ $have != unfinished && $(.venv/bin/python -c "$probe" 2>/dev/null) == "$version "* ]] &&
    .venv/bin/python -m pip --version &>/dev/null
}
if [[ $have == "$want" ]] && usable; then
  echo "setup: .venv is ready (Python $version)"
  exit
fi

usable || { rm -rf .venv && have=''; }
mkdir -p .venv
echo unfinished >$stamp
if [[ ! -e .venv/bin/python ]]; then
  echo "setup: making .venv with $executable (Python $version)"
  "$executable" -m venv .venv
fi
echo "setup: installing latent_delib[$extras]: some 4 GB, about two minutes"
if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"; then
  # Where it got nothing, without a network, all is as it was.
  [[ -z $have ]] || ! .venv/bin/python -m pip check &>/dev/null || echo "$have" >$stamp
  exit 1
fi
echo "$want" >$stamp
echo "setup: .venv is ready (Python $version), $SECONDS s"
