"""Functions and tools run by several processes of one group, on this machine.

Processes are forks of the tests' own: they start with everything imported. That launchers start
tools as well is what tests/test_launchers.py is for.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kills import free_port

from kw.cli import main
from kw.training.distributed import process_group

__all__ = ["call", "in_processes"]

ROOT = Path(__file__).parents[1]


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


def call(*arguments: object, processes: int = 1, status: int = 0) -> subprocess.CompletedProcess:
    """Run a tool, on several processes as torchrun would; checks the exit status of all."""
    words = [str(argument) for argument in arguments]
    if processes > 1:
        words += ["--launcher", "pytorch"]
    port = free_port()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_tool, args=(words, rank, processes, port, Path(folder)))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
        out, err = (
            "".join(Path(folder, f"{rank}.{name}").read_text() for rank in range(processes))
            for name in ("out", "err")
        )
    assert [process.exitcode for process in started] == [status] * processes, out[-2000:] + err
    return subprocess.CompletedProcess(words, status, out, err)


def _tool(words: list[str], rank: int, world: int, port: int, folder: Path) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(folder / f"{rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    # pytest may have put objects of its own in their place.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = words
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        if words[0].startswith("kw "):
            main([*words[0].split()[1:], *words[1:]])
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
