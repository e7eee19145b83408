"""Functions run by several processes of one group, on this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from kills import free_port

from kw.engine.distributed import process_group

__all__ = ["in_processes"]


def in_processes(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run a function in forked processes of one group; arguments: the process, then these."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_joined, args=(function, rank, world, port, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world


def _joined(
    function: Callable[..., None], rank: int, world: int, port: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with process_group("pytorch", 2.0) as process:
        function(process, *arguments)
