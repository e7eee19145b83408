"""Ending a run on a signal: all processes stop after the same update.

A scheduler sends SIGTERM, a user presses Ctrl-C, a terminal that is closed sends SIGHUP. The
current update is finished, a checkpoint is written, and the program ends with status 75.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import Process, hosts


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While inside, SIGTERM, SIGINT and, unless nohup has it ignored, SIGHUP call a function.

    In another thread than the main one, signals cannot be watched and are left as they are.
    """
    watched = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        watched.append(signal.SIGHUP)
    try:
        before = {each: signal.signal(each, handler) for each in watched}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # one that is not Python's cannot be set from here
                signal.signal(number, earlier)


class Signals:
    """Remembers that the process was asked to end."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came

    def watched(self) -> AbstractContextManager[None]:
        """While inside, such signals are noted; a second SIGINT interrupts at once."""
        return on_signals(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class Agreement:
    """Shares requests to save or stop: all processes learn of one at the same update, one later.

    Two bytes are reduced over a process group on the CPUs while the next update computes, so that
    no update waits for a device.
    """

    def __init__(self, process: Process) -> None:
        self._group = hosts() if process.world_size > 1 else None
        self._word = torch.zeros(2, dtype=torch.uint8)
        self._pending: Any = None

    def exchange(self, save: bool, stop: bool) -> tuple[bool, bool]:
        """Send whether this process wants a checkpoint, and whether it has to end.

        Returns:
            Whether any process wanted, and whether any had to, at the update before; of a process
            on its own, at once.
        """
        if self._group is None:
            return save, stop
        heard = (False, False)
        if self._pending is not None:
            self._pending.wait()
            heard = bool(self._word[0]), bool(self._word[1])
        # What was heard is done now, and not asked for again.
        self._word = torch.tensor([save and not heard[0], stop], dtype=torch.uint8)
        self._pending = dist.all_reduce(
            self._word, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return heard
