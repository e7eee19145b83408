"""The processes of a run: joining the group, waiting for one another, equal statistics."""

from __future__ import annotations

import atexit
import gc
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..config import ConfigError
from ..errors import EXIT_MISSING, MissingProcess, one_line
from ..torch_private import BatchNorm
from .presence import Presence, set_place, watched

LAUNCHERS = ("none", "pytorch", "slurm")
NCCL_MARGIN = timedelta(minutes=1)
_hosts: Any = None
_T = TypeVar("_T")


@dataclass(frozen=True)
class Process:
    """One of the ``world_size`` processes of a run, and the device that it computes on; rank 0
    writes logs and checkpoints."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def find_process(launcher: str) -> Process:
    """Read rank and device from the launcher's environment, without joining a group.

    Raises:
        ConfigError: as for :func:`process_group`.
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
            "torchrun --nproc-per-node GPUS -m kw train CONFIG --launcher pytorch"
        )
    wrong = [f"{key}={os.environ[key]!r}" for key in counts if not os.environ[key].isdecimal()]
    if wrong:
        raise ConfigError(f"--launcher {launcher}: {', '.join(wrong)}: expected numbers")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = _CPU
    if torch.cuda.is_available():
        count = shown = torch.cuda.device_count()
        option = "--nproc-per-node"
        if launcher == "slurm":  # it may show a process some of the machine's GPUs only
            count = int(os.environ.get("SLURM_GPUS_ON_NODE", local_rank + 1))
            option = "--ntasks-per-node"
        if local_rank >= count:
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: it has {count}; lower {option}"
            )
        device = torch.device("cuda", local_rank % shown)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size(), device)
    return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


@contextmanager
def process_group(launcher: str, timeout_minutes: float) -> Iterator[Process]:
    """Join the process group of a run: nccl on GPUs, gloo on CPU.

    Args:
        launcher: ``"none"`` for one process, ``"pytorch"`` under torchrun, ``"slurm"`` under srun.
        timeout_minutes: how long a process waits for another.

    Raises:
        ConfigError: the launcher's environment variables are missing or of no use, or there are
            fewer GPUs than processes on this machine.
        MissingProcess: another process did not start, died, hangs or does other work; the message
            names it.
    """
    global _hosts
    process = find_process(launcher)
    if launcher == "none":
        yield process
        return
    timeout = timedelta(minutes=timeout_minutes)
    before, joins = _hosts, not dist.is_initialized()  # else in a group of the caller's
    try:
        with ExitStack() as stack:
            if joins:
                launcher_keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                keeper = None if launcher_keeps else 0
                store = _connect(timeout, keeper, listens=process.rank == keeper)
                if process.world_size > 1:
                    heart = _connect(timeout, keeper)  # one that waits cannot serve other calls
                    line = socket.create_connection(_address(), timeout.total_seconds())
                    rank, size = process.rank, process.world_size
                    presence = Presence(heart, line, rank, size, timeout, keeper)
                    stack.enter_context(watched(presence))
                on_gpu = process.device.type == "cuda"
                dist.init_process_group(
                    "nccl" if on_gpu else "gloo",
                    store=store,
                    rank=process.rank,
                    world_size=process.world_size,
                    # nccl ends the process without a message: gloo is to fail first.
                    timeout=timeout + NCCL_MARGIN if on_gpu else timeout,
                    device_id=process.device if on_gpu else None,
                )
            if process.world_size > 1:
                _hosts = dist.new_group(backend="gloo", timeout=timeout)
            yield process
    except MissingProcess:
        if process.device.type == "cuda":  # nccl may block for good
            timer = threading.Timer(30, os._exit, (EXIT_MISSING,))
            timer.daemon = True
            timer.start()
        raise
    finally:
        own, _hosts = _hosts, before
        if dist.is_initialized() and (joins or own is not before):
            dist.destroy_process_group(None if joins else own)
        # A finished run keeps its groups in reference cycles (DistributedDataParallel's). A thread
        # of gloo takes the interpreter's lock to free the tensors of a call. If it does so while
        # the interpreter shuts down, the process aborts and its exit status is lost (torch 2.15).
        atexit.unregister(gc.collect)
        atexit.register(gc.collect)


def hosts() -> Any:
    """The process group on the CPUs (gloo); None for a single process."""
    return _hosts


def host_barrier(place: str) -> None:
    """Wait for all processes on the CPUs, before a collective call that others may reach late.

    A collective call on a GPU cannot say which process it waits for; a barrier on the CPUs can.
    """
    set_place(place)
    if _hosts is not None:
        dist.barrier(group=_hosts)


def from_first(own: _T) -> _T:
    """The first process's value, on all of them: plain types; a collective call."""
    return from_all(own)[0]


def from_all(own: _T) -> list[_T]:
    """Every process's value, by rank: plain types and tensors on the CPU; a collective call."""
    found = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found *= dist.get_world_size()
        dist.all_gather_object(found, own, group=_hosts)
    return found


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
    norms = (m for m in model.modules() if isinstance(m, BatchNorm))
    return [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]


def _connect(timeout: timedelta, keeper: int | None, listens: bool = False) -> dist.Store:
    """A new connection to the processes' store, which ``keeper`` runs, or None: the launcher."""
    address, port = _address()
    try:
        # The keeper does not wait for the others: they are to be named, not counted.
        store = dist.TCPStore(
            address, port, None, listens, timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        if listens:
            raise ConfigError(
                f"process 0 cannot listen at MASTER_ADDR:MASTER_PORT {address}:{port}: "
                f"{one_line(error)}; choose another port, or end what uses it"
            ) from error
        who = "the launcher" if keeper is None else f"process {keeper}"
        raise MissingProcess(
            f"{who}, which keeps the processes' store, never joined the run: process "
            f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']} found nobody at {address}:{port} "
            f"(MASTER_ADDR:MASTER_PORT) within {timeout.total_seconds():g} s "
            "(distributed.timeout_minutes)"
        ) from error
    # torchrun keeps one store over restarts, with the addresses of dead processes.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"restart_{restarts}", store)


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _translate_slurm() -> None:
    """Set torchrun's environment variables from srun's."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for source in (*names.values(), "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST"):
        if source not in os.environ:
            raise ConfigError(f"--launcher slurm: {source} is not set; start the run with srun")
    os.environ.update({key: os.environ[source] for key, source in names.items()})
    if each := re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        os.environ["LOCAL_WORLD_SIZE"] = max(each, key=int)  # of 8(x2),4
    # scontrol, which names the hosts too, is missing in containers: of n[3-4,7],m the first is n3.
    hosts = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"])
    os.environ.setdefault("MASTER_ADDR", hosts.split(",")[0])
    # Jobs and steps that share a node need different ports, none of those (from 32768) that the
    # system gives to connections.
    place = 1009 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + place % 12000))


_CPU = torch.device("cpu")
