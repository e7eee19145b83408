"""Processes: how a run joins its group, and what it keeps equal across it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..config import ConfigError

__all__ = [
    "LAUNCHERS",
    "TIMEOUT",
    "Process",
    "average_batch_norm",
    "batch_norm_buffers",
    "join_group",
    "leave_group",
]

LAUNCHERS = ("none", "pytorch", "slurm")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process among those of the run.

    Attributes:
        rank: from 0; rank 0 writes logs and checkpoints.
        world_size: number of processes.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def join_group(launcher: str) -> Process:
    """Join the run's process group: nccl where there are GPUs, gloo on CPU.

    Args:
        launcher: ``"none"`` for one process, ``"pytorch"`` under torchrun, ``"slurm"`` under srun.

    Raises:
        ConfigError: the launcher's environment variables are missing, or there are fewer GPUs than
            processes on this machine.
    """
    if launcher == "none":
        return Process(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else _CPU)
    if launcher == "slurm":
        _translate_slurm()
    counts = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    missing = [key for key in (*counts, "MASTER_ADDR") if key not in os.environ]
    if missing:
        raise ConfigError(
            f"--launcher {launcher}: {', '.join(missing)} not set; start the run as "
            "torchrun --nproc-per-node GPUS tools/train.py CONFIG --launcher pytorch"
        )
    wrong = [f"{key}={os.environ[key]!r}" for key in counts if not os.environ[key].isdecimal()]
    if wrong:
        raise ConfigError(f"--launcher {launcher}: {', '.join(wrong)}: expected numbers")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = _CPU
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: it has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        bound = None if device.type == "cpu" else device
        # torchrun keeps one store over restarts, where dead processes' addresses still stand.
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        attempt = dist.PrefixStore(f"restart_{restarts}", store)
        dist.init_process_group(
            backend, store=attempt, rank=rank, world_size=size, timeout=TIMEOUT, device_id=bound
        )
    return Process(dist.get_rank(), dist.get_world_size(), device)


def leave_group() -> None:
    """Leave the group, so that the process ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def average_batch_norm(model: nn.Module) -> None:
    """Average the running statistics of BatchNorm over all processes; a collective call.

    Every process sees other images, so their statistics differ until this is called: before an
    evaluation or a checkpoint, or each process would evaluate another model.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    buffers = batch_norm_buffers(model)
    if not buffers:
        return
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean)


def batch_norm_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Running means and variances of all BatchNorm layers, in the order of the modules."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]


def _translate_slurm() -> None:
    """What srun calls its processes, in torchrun's words."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for key, source in names.items():
        if source not in os.environ:
            raise ConfigError(f"--launcher slurm: {source} is not set; start the run with srun")
        os.environ[key] = os.environ[source]
    if "MASTER_ADDR" not in os.environ:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
            check=True,
            capture_output=True,
            text=True,
        )
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    # Jobs that share a node must not meet at one port.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))


_CPU = torch.device("cpu")
