#!/usr/bin/env bash
# Makes .venv in the repository's root: what setup.py asks for, in versions that are tested. Does nothing if that is done
# already, and starts again if it was cut short. Takes uv where it is on PATH, else pip in the version of constraints.txt.
#
#   setup.sh [EXTRA ...]           extras of setup.py to add; without any: seqio; `base`: none. What an earlier call added
#                                  stays. tasks is left out where Python cannot build extensions (PyPI has only the source
#                                  of one of its parts), seqio on Python 3.14.
#   LATENT_DELIB_EXTRAS=tpu        more of them, through any script that calls this: tpu, cuda, eval, hub, tfds, mixture,
#                                  reference, wandb, or several with commas between
#   PYTHON=/opt/py312/bin/python   a Python 3.11 to 3.14 to take instead of one on PATH
set -euo pipefail
[[ ${1:-} != --help && ${1:-} != -h ]] || exec "$(dirname "$(readlink -f "$0")")/common.sh" "$(readlink -f "$0")"
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
named=${LATENT_DELIB_EXTRAS:-}
read -ra more <<<"${named//,/ }"
known=" base $(sed -nE 's/^ +"([a-z]+)":.*/\1/p' setup.py | tr '\n' ' ')"
for extra in "$@" "${more[@]}"; do # pip would only warn
  [[ $known == *" $extra "* ]] || { echo "error: $extra: expected extras of setup.py, or base:$known" >&2 && exit 1; }
done

stamp=.venv/setup.stamp # what .venv was made from, or `unfinished`

if command -v flock >/dev/null; then # a second call at the same time waits, then finds the work done
  exec 9<setup.py
  flock --nonblock 9 || { echo "setup: waiting for another setup.sh" && flock 9; } || true
fi

# Each interpreter is asked by running it: a name on PATH may be a shim with nothing behind it. It answers with its base
# executable, because an environment cannot be replaced by the interpreter inside it, and with the extras it cannot have.
probe='
import os, shutil, sys, sysconfig
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    print(version)
    sys.exit(1)
try:
    import ensurepip
except ImportError:
    print("%s without ensurepip (on Debian: apt-get install python%d.%d-venv)" % ((version,) + sys.version_info[:2]))
    sys.exit(1)
compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
builds = compiler and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
lacks = ([] if builds else ["tasks"]) + (["seqio"] if sys.version_info[:2] == (3, 14) else [])
print(version, ",".join(lacks) or "-", sys._base_executable)  # the path last: it may have blanks
'
candidates=(.venv/bin/python python3.12 python3.11 python3.13 python3.14 python3)
[[ -z ${PYTHON:-} ]] || candidates=("$PYTHON") # another in its place would go unnoticed
found=
for candidate in "${candidates[@]}"; do
  command -v "$candidate" >/dev/null || continue
  answer=$("$candidate" -c "$probe" 2>/dev/null) && break
  found+="${found:+, }$candidate is ${answer:-broken}"
  answer=
done
if [[ -z ${answer:-} ]]; then
  where=${PYTHON:+"PYTHON=$PYTHON: "}
  echo "error: ${where}Python 3.11 to 3.14 with ensurepip is needed, found: ${found:-none}; PYTHON=... names another" >&2
  exit 1
fi
read -r version lacks executable <<<"$answer"
constraints=constraints.txt
[[ $version == 3.11.* ]] || constraints="constraints-3.12.txt"

have=$(cat $stamp 2>/dev/null || true)
extras=
[[ $have != "$version "* ]] || read -r _ extras _ <<<"$have"
[[ $extras != base ]] || extras=
add() { [[ $1 == base || ,$extras, == *",$1,"* ]] || extras+=${extras:+,}$1; }
(($#)) || set -- seqio
for extra; do
  [[ ,$lacks, == *",$extra,"* ]] || add "$extra"
done
for extra in "${more[@]}"; do
  add "$extra"
done
[[ -n $extras ]] || extras=base # a stamp has no empty word
want="$version $extras $PWD $(cat setup.py $constraints | cksum)"
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
echo "setup: installing latent_delib[$extras], a minute or two"
pip=(.venv/bin/python -m pip install --disable-pip-version-check)
! command -v uv >/dev/null || pip=(uv pip install --python .venv/bin/python)
pip+=(--quiet -c "$constraints")
package=.
[[ $extras == base ]] || package=".[$extras]"
if ! { "${pip[@]}" pip && "${pip[@]}" -e "$package"; }; then # the installer first, in the version that is tested
  # Where it got nothing, without a network, all is as it was.
  [[ -z $have ]] || ! .venv/bin/python -m pip check &>/dev/null || echo "$have" >$stamp
  exit 1
fi
echo "$want" >$stamp
echo "setup: .venv is ready (Python $version), $SECONDS s"
