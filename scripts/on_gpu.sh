#!/usr/bin/env bash
# What only a GPU can show, in slices: a call trains for so many seconds, and the next one goes on with what it began.
#
#   scripts/on_gpu.sh tests                          the tests that need CUDA
#   scripts/on_gpu.sh benchmark                      the speed of training beside a conventional loop
#   scripts/on_gpu.sh planned [SECONDS] [KEY=VALUE]  the studies 1g to 4g of docs/plan.md, in their order: as many runs
#                                                    as the time allows (540 seconds by default)
#   scripts/on_gpu.sh study [SECONDS] [KEY=VALUE]    the same of one study, study=accuracy at the paper's full width by
#                                                    default
#   scripts/on_gpu.sh all                            tests, benchmark, planned
#
# After that time the records of a study are packed, of planned ones the networks, too. PYTHON (default .venv/bin/python)
# is the interpreter, DATA_DIR (default ./data) where the data sets lie.
# With NVIDIA's MPS running (nvidia-cuda-mps-control -d), an H200 trains fourteen narrow networks at once twice as fast.
# Tried without a GPU: scripts/on_gpu.sh planned 60 device=cpu dataset=digits model=binarynet model.width=0.0625 \
#     recipe.epochs=2 recipe.batch_size=64
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export WANDB_MODE=${WANDB_MODE:-offline}

# In the foreground, so that Ctrl-C reaches what runs.
tests() { timeout --foreground 590 "$PYTHON" -m pytest -q -m gpu; }

benchmark() { timeout --foreground 590 "$PYTHON" scripts/benchmark.py --quick; }

# SECONDS, what `runs.py --pack` is to add, KEY=VALUE...
study() {
    local seconds=$1 pack=$2 name="" status=0
    shift 2
    for override in "$@"; do
        [[ $override == study=* && -z $name ]] && name=${override#study=}
        [[ $override == name=* ]] && name=${override#name=}
    done
    # SIGTERM ends a sweep in order: what is unfinished goes on from its last whole epoch at the next call.
    timeout --foreground --signal=TERM --kill-after=30 "$seconds" "$PYTHON" train.py seeds_at_once=auto "$@" || status=$?
    if [[ $status != 0 && $status != 124 && $status != 143 ]]; then
        echo "error: the study ended with code $status; its runs so far are packed all the same." >&2
    fi
    [[ $status == 124 || $status == 143 ]] && status=0  # the time is up
    [[ -n $(find "results/$name" -name result.json -print -quit 2>/dev/null) ]] || return "$status"  # nothing to pack yet
    "$PYTHON" scripts/runs.py --pack "results/$name" $pack || status=$?
    "$PYTHON" scripts/runs.py "results/$name"
    return "$status"
}

# SECONDS, KEY=VALUE...: the second study begins when the first has ended, also with runs that failed, with the time that
# is left. On a CPU, where it is tried, the names end in -tried.
planned() {
    local end=$((SECONDS + $1)) left each worst=0 on=gpu
    shift
    [[ " $* " == *" device=cpu "* ]] && on=tried
    local trained=(dataset=cifar10 model=binarynet model.width=0.25 recipe.epochs=20 recipe.batch_size=128
        recipe.optimizer.lr=5e-3 norm=bn,bn_noscale,abn,abn_forward,abn_backward,abn_noshift)
    for each in trained schedules cifar100 ablation; do
        left=$((end - SECONDS))
        ((left > 30)) || break
        case $each in
            trained) study "$left" --networks study=trained name=trained-$on seeds=one "seed=range(20,40)" "$@" || worst=$? ;;
            schedules) study "$left" "" study=schedules name=schedules-$on precision=fp32 "$@" || worst=$? ;;
            cifar100)
                study "$left" --networks study=trained name=trained-cifar100-$on seeds=one "seed=range(0,20)" \
                    dataset=cifar100 "primary.datasets=[cifar100]" "$@" || worst=$?
                ;;
            ablation)
                study "$left" --networks study=ablation name=ablation-$on "seed=range(40,50)" "${trained[@]}" "$@" \
                    || worst=$?
                ;;
        esac
    done
    return "$worst"
}

verb=${1:-all}
shift || true
seconds=540
if [[ ${1:-} =~ ^[0-9]+$ ]]; then seconds=$1; shift; fi
# Else a CPU would train, and finish, runs in the place of a GPU's.
if [[ " tests benchmark planned study all " == *" $verb "* && " $* " != *" device=cpu "* ]]; then
    "$PYTHON" -c 'import sys; from abn_exp.training.setup import cuda_works; sys.exit(not cuda_works())' ||
        { echo "error: torch sees no CUDA device; device=cpu tries it on a CPU." >&2; exit 1; }
fi
case $verb in
    tests | benchmark) "$verb" ;;
    planned) planned "$seconds" "$@" ;;
    study)
        [[ " $*" == *" study="* ]] || set -- study=accuracy "$@"
        study "$seconds" "" "$@"
        ;;
    all)  # a test that fails, or the benchmark out of time, costs no study its turn
        worst=0
        tests || worst=$?
        benchmark || worst=$?
        planned "$seconds" "$@" || worst=$?
        exit "$worst"
        ;;
    *) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
