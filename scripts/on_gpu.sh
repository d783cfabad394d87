#!/usr/bin/env bash
# What only a GPU can show, in slices of less than ten minutes; each call goes on with what an earlier one began.
#
#   scripts/on_gpu.sh tests                        the tests that need CUDA
#   scripts/on_gpu.sh benchmark                    the speed of training beside a conventional loop
#   scripts/on_gpu.sh study [SECONDS] [KEY=VALUE]  runs of study=accuracy at the paper's full width, as many as the
#                                                  time allows (540 seconds by default); then the records are packed
#   scripts/on_gpu.sh all                          the three, one after another
#
# PYTHON (default .venv/bin/python) is the interpreter, DATA_DIR (default ./data) where the data sets lie.
# Tried without a GPU: scripts/on_gpu.sh study 60 device=cpu dataset=digits model=binarynet model.width=0.0625 \
#     recipe.epochs=2 recipe.batch_size=64 seed=0 name=accuracy-small
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export WANDB_MODE=${WANDB_MODE:-offline}

tests() { timeout 590 "$PYTHON" -m pytest -q -m gpu; }

benchmark() { timeout 590 "$PYTHON" scripts/benchmark.py --quick; }

study() {
    local seconds=540 name=accuracy status=0
    if [[ ${1:-} =~ ^[0-9]+$ ]]; then seconds=$1; shift; fi
    for override in "$@"; do [[ $override == name=* ]] && name=${override#name=}; done
    # SIGTERM ends a sweep in order: what is unfinished goes on from its last whole epoch at the next call.
    timeout --signal=TERM --kill-after=30 "$seconds" "$PYTHON" train.py study=accuracy "$@" || status=$?
    if [[ $status != 0 && $status != 124 && $status != 143 ]]; then
        echo "error: the study ended with code $status; its runs so far are packed all the same." >&2
    fi
    "$PYTHON" scripts/runs.py --pack "results/$name"
    "$PYTHON" scripts/runs.py "results/$name"
    [[ $status == 124 || $status == 143 ]] || return "$status"
}

case ${1:-all} in
    tests | benchmark) "$1" ;;
    study) shift; study "$@" ;;
    all) tests; benchmark; study ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
