#!/usr/bin/env bash
# Make the pictures of docs/pictures anew: train the demo's network on digits, then draw every kind.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == -h || ${1:-} == --help || $# -gt 1 ]]; then
    cat <<TEXT
usage: $(basename "$0") [FOLDER]

Writes the pictures of docs/visualizing.md and docs/method.md to FOLDER (default: docs/pictures).
The run that they show is work_dirs/pictures; one that is there is drawn again, not repeated.

    PYTHON        interpreter (default: .venv/bin/python, else python3)
TEXT
    exit 0
fi

out=${1:-docs/pictures}
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=${PYTHON:-python3}
config=configs/demo/kw_resnet18_1x.yaml
digits=work_dirs/demo/digits
run=work_dirs/pictures/kw_resnet18_1x

[[ -d $digits/val ]] || "$python" -m kw.data.digits "$digits"
if [[ ! -f $run/epoch_18.pth ]]; then
    "$python" tools/train.py "$config" --work-dir "$run" --resume \
        --cfg-options checkpoint.keep=18 pictures.interval=6
fi
checkpoint=$run/epoch_18.pth

draw() { "$python" tools/visualize.py "$@"; }

# The first test image of every digit.
images=()
for folder in "$digits"/val/*/; do
    files=("$folder"*)
    images+=("${files[0]}")
done

draw partition --out "$out/partition.png"
draw mixing --out "$out/mixing.png"
draw attention "$checkpoint" --images 359 --out "$out/attention.png"
draw attention "$checkpoint" --over classes --images 350 --out "$out/classes.png"
draw cells "$checkpoint" --images 359 --out "$out/cells.png"
draw history "$run" --images 64 --warehouse layer3 --out "$out/history.png"
draw kernels "$checkpoint" "${images[3]}" "${images[8]}" \
    --layers 'layer1.1.conv2|layer3.1.conv1' --out "$out/kernels.png"
draw cam "$checkpoint" "${images[@]}" --out "$out/cam.png"
draw batches "$config" --cfg-options data.mixup=0.8 data.cutmix=1.0 'data.random_erasing={}' \
    data.auto_augment=rand-m9-mstd0.5-inc1 label_smoothing=0.1 --out "$out/batches.png"
draw schedules configs/imagenet/resnet18/kw_resnet18_1x.yaml --out "$out/schedules.png"
