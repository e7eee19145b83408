#!/usr/bin/env bash
# Train with torchrun on one machine or several; a job that fails is restarted from its checkpoints.
set -euo pipefail

usage() {
    cat <<TEXT
usage: [SETTING=VALUE ...] $(basename "$0") CONFIG [tools/train.py options]

Starts torchrun with tools/train.py CONFIG --launcher pytorch --resume: a new run where there is no
checkpoint yet, else the run goes on from the newest whole one. Relative paths start in the folder
that it is called in.

    PROCESSES     processes on this machine (default: the GPUs that PyTorch sees, or 1)
    NODES         machines, e.g. 4, or a range for elastic training, e.g. 2:4 (default 1)
    RENDEZVOUS    host:port that all machines can reach; needed for several (any of them will do)
    JOB           name that the machines of one job share (default: the configuration's name)
    RESTARTS      how often the processes are started again when one of them dies (default 3)
    PYTHON        interpreter (default: .venv/bin/python beside this script's folder, else python3)

One machine with all its GPUs:
    scripts/train.sh configs/imagenet/resnet50/kw_resnet50_4x.yaml
Two machines, on each of them:
    NODES=2 RENDEZVOUS=node0:29500 scripts/train.sh configs/imagenet/resnet50/kw_resnet50_4x.yaml

When a process dies, torchrun stops the others and starts all again. The recipe stays that of
total_batch_size, on fewer machines too. On SIGTERM every process saves a checkpoint first.
TEXT
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    usage
    exit $(($# == 0 ? 2 : 0))
fi

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ ! -x $python ]] && ! python=$(command -v "${PYTHON:-python3}"); then
    echo "$(basename "$0"): PYTHON=${PYTHON:-python3}: no such interpreter" >&2
    exit 2
fi

config=$1
shift
# nvidia-smi would also list GPUs that CUDA_VISIBLE_DEVICES leaves out, and none of AMD's.
count='import torch; print(max(torch.cuda.device_count(), 1))'
processes=${PROCESSES:-$("$python" -c "$count")}
nodes=${NODES:-1}
name=$(basename "${config%.*}")

rendezvous=(--standalone)
if [[ $nodes != 1 ]]; then
    if [[ -z ${RENDEZVOUS:-} ]]; then
        echo "$(basename "$0"): NODES=$nodes needs RENDEZVOUS=host:port" >&2
        exit 2
    fi
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${JOB:-$name}")
fi

# A store of its own for every start: in a shared one, processes would look for dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Time to save after a signal, also for an evaluation that is finished first: torchrun gives 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Under nohup, torchrun would nevertheless end its processes when the terminal is closed.
[[ -n $(trap -p HUP) ]] && export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" \
    --max-restarts "${RESTARTS:-3}" "${rendezvous[@]}" \
    "$root/tools/train.py" "$config" --launcher pytorch --resume "$@"
