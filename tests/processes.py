"""Functions and tools run by several processes of one group, on this machine.

Processes are forks of the tests' own: they start with everything imported. That launchers start
tools as well is what tests/test_launchers.py is for.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kills import free_port

from kw.cli import main
from kw.training.distributed import process_group

__all__ = ["Forked", "call", "in_processes"]

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


def call(
    *arguments: object,
    processes: int = 1,
    status: int | None = 0,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a tool, on several processes as torchrun would; checks the exit status of all.

    Args:
        *arguments: the tool and what it is given.
        processes: how many.
        status: the exit status that all of them must have; None takes any.
        cwd: folder it runs in.
        environment: variables in the place of the tests' own.
    """
    words = [str(argument) for argument in arguments]
    if processes > 1:
        words += ["--launcher", "pytorch"]
    port = free_port()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(
                target=_tool, args=(words, rank, processes, port, Path(folder), cwd, environment)
            )
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
    codes = [process.exitcode for process in started]
    assert status is None or codes == [status] * processes, out[-2000:] + err
    return subprocess.CompletedProcess(words, max(code or 0 for code in codes), out, err)


def _tool(
    words: list[str],
    rank: int,
    world: int,
    port: int,
    folder: Path,
    cwd: Path,
    environment: Mapping[str, str] | None,
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(folder / f"{rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    # pytest may have put objects of its own in their place.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    os.chdir(cwd)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        added = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = filter(None, added)
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


class Forked(subprocess.Popen):
    """Takes the place of ``subprocess.Popen``: ``python ARGUMENTS...`` is a fork of this process.

    For programs that are started by what is tested, where a new interpreter would import for
    seconds what is here. Other programs are started as ever.
    """

    def __init__(self, args: Sequence[Any], **settings: Any) -> None:
        if args[0] == sys.executable:
            words = [str(word) for word in args[1:]]
            settings["preexec_fn"] = partial(_python, words, settings.get("env"))
        super().__init__(args, **settings)


def _python(words: list[str], environment: Mapping[str, str] | None) -> None:
    """What the interpreter would do with these words; does not return."""
    status = 1
    try:
        atexit._clear()
        _forget_pipes()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        if words[:2] == ["-m", "kw"]:
            sys.argv = words[1:]
            main()
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _forget_pipes() -> None:
    """Close the pipes that a new program would not inherit: whoever waits for them goes on."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
            if pipe and not os.get_inheritable(descriptor):
                os.close(descriptor)
        except OSError:
            pass  # the listing's own
