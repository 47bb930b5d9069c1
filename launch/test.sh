#!/usr/bin/env bash
# Checks lint, format and types of the public interface, then runs the tests. Arguments go to pytest; of two equal flags the
# last counts:
#
#   ./launch/test.sh                     # all but the slow tests, two at a time
#   ./launch/test.sh -m slow             # the slow ones
#   LATENT_DELIB_EXTRAS=reference ./launch/test.sh -m reference    # makes golden values again, with torch
#   ./launch/test.sh -n 0 tests/nn -k rotary
# shellcheck source=common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
[[ ${1:-} != --help && ${1:-} != -h ]] || usage

./launch/setup.sh test tasks
./launch/get_smollm2.sh >/dev/null # a real decoder, for the tests that compare with its reference
python=.venv/bin/python
$python -m ruff check
$python -m ruff format --check
$python -m mypy
exec $python -m pytest -n 2 --dist worksteal -m "not slow" "$@" # worksteal: the tests of a file share what they compile
