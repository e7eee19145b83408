#!/usr/bin/env bash
# Measure this machine's standard set: results into docs/benchmarks, tables into docs/benchmarks.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

measure() {  # FAMILY RATIOS OPTIONS...
    local family=$1 ratio files=()
    for ratio in $2; do
        files+=("configs/imagenet/$family/kw_${family}_$ratio.yaml")
    done
    "$python" tools/benchmark.py "${files[@]}" --name "$family" --out docs/benchmarks "${@:3}"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # As configurations come (NCHW, eager), and as one would make them fast.
    for family in resnet18 resnet50; do
        for fast in "" "--channels-last" "--channels-last --compile"; do
            # shellcheck disable=SC2086  # several options
            measure "$family" "1x 4x" --mode inference train memory --device cuda \
                --dtype bfloat16 --batch-size 128 $fast
        done
    done
else
    # About a quarter of an hour on two cores, so few rounds where a step takes seconds.
    measure resnet18 "1x 4x" --mode inference --rounds 25
    measure resnet18 "1x 4x" --mode train --rounds 15
    measure resnet18 "4x" --mode memory --batch-size 32
    measure resnet50 "1x 4x" --mode inference --rounds 12
fi
"$python" tools/benchmark.py --render docs/benchmarks
