"""Heartbeats identify dead or hung ranks.

A thread of each process writes one record, its heartbeat, into the store that the process group was
built with. Training itself does not use the store; it sets an attribute that says where it is. The
records of others are read only when a collective call fails, for a few heartbeats. A process whose
record no longer changes is dead, stopped or cut off; a process whose record changes is alive at
another place. Each process measures ages by its own clock, so the clocks of hosts may differ.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..errors import EXIT_MISSING, MissingProcess, one_line

_GLOO = re.compile(
    r"gloo/|Timed out waiting \d+ms|Connection (closed|reset) by peer|Connection refused"
    r"|Application timeout caused pair closure|Broken pipe|Socket closed"
)
_RUNNING, _WAITS = "running", "waits"
_current: Presence | None = None


@dataclass(frozen=True)
class Beat:
    """One heartbeat of a process."""

    process: str  # its rank, host and process id, as messages name it
    number: int  # count of heartbeats
    clock: float  # seconds since the processes joined
    step: int  # count of places so far; equal on processes that do the same work
    place: str  # what the process is doing
    since: float  # seconds since it began that
    state: str  # running; waits: a collective call failed; or the reason why it left

    @property
    def has_left(self) -> bool:
        return self.state not in (_RUNNING, _WAITS)

    def fault(self, age: float, role: str = "") -> str:
        """The message about a process whose last heartbeat is ``age`` seconds old."""
        how = f"is dead or stopped: last heard from {_seconds(age)} ago"
        if self.has_left:
            how = f"{self.state}, {_seconds(age)} ago"
        return f"{self.process}{role} {how}, {self.place}"


def set_place(place: str) -> None:
    """Set what this process is doing, for messages of other processes; an attribute write.

    All processes must call this in the same order: one that does not is reported as lost.
    """
    if _current is not None:
        _current.place = (_current.place[0] + 1, place, time.monotonic())


def log_to(path: Path) -> None:
    """Set the text log that missing processes are written to, by the lowest rank that is left."""
    if _current is not None:
        _current.log = path


def is_of_communication(error: BaseException) -> bool:
    """Whether an error comes from the communication between processes."""
    if isinstance(error, dist.DistError):  # nccl's, and the store's
        return True
    return type(error) is RuntimeError and _GLOO.search(str(error)) is not None


@contextmanager
def watched(presence: Presence) -> Iterator[None]:
    """Wait for all processes; inside, send heartbeats and name the missing one when a call fails.

    Raises:
        MissingProcess: a process never came, died, hangs, or is not where the others are.
    """
    global _current
    presence.join()
    _current = presence
    how = "had ended its run"
    try:
        yield
    except BaseException as error:
        how = f"ended with {one_line(error)}"
        causes = [each for each in (error, error.__cause__) if each is not None]
        if isinstance(error, MissingProcess) or not any(map(is_of_communication, causes)):
            raise
        message = presence.explain(error)
        if message is None:
            raise
        raise MissingProcess(message) from error
    finally:
        _current = None
        presence.leave(how)


class Presence:
    """Sends this process's heartbeats and reads those of the others.

    Args:
        store: for the heartbeats; a connection that nothing else waits on.
        line: another connection to the store, which closes when the store is gone.
        rank: this process.
        world_size: number of processes.
        timeout: how long a process waits for another.
        keeper: the process that keeps the store, or None where a launcher does.

    Attributes:
        log: text log of the run, where there is one.
        place: count of places so far, what this process is doing, and since when.
    """

    def __init__(
        self,
        store: dist.Store,
        line: socket.socket,
        rank: int,
        world_size: int,
        timeout: timedelta,
        keeper: int | None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout.total_seconds()
        self.keeper = keeper
        self.interval = min(1.0, self.timeout / 10)
        # Under load a heartbeat may be late by as much.
        self.patience = max(1.0, 3 * self.interval)
        self.log: Path | None = None
        self._store = dist.PrefixStore("presence", store)
        self._line = line
        self._line.setblocking(False)
        who = f"({socket.gethostname()}, pid {os.getpid()})"
        self._name = f"process {rank} of {world_size} {who}"
        self._self = f"this process, {rank} {who},"
        self._start = time.monotonic()
        self.place = (0, "before the run began", self._start)
        self._state = _RUNNING
        self._number = 0
        self._missing: dict[int, str] | None = None  # what is said of each, once it is known
        self._kept: tuple[Beat, float] | None = None  # the keeper's last heartbeat, and when
        self._wake, self._known, self._out = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def join(self) -> None:
        """Wait until all processes are there; then start sending heartbeats.

        Raises:
            MissingProcess: some did not come in time.
        """
        until = time.monotonic() + self.timeout
        try:
            self._beat()
            self._reach().add("joined", 1)
            while (joined := self._reach().add("joined", 0)) < self.world_size:
                if self._learns() or time.monotonic() > until:
                    everyone = range(self.world_size)
                    absent = [r for r in everyone if not self._reach().check([f"beat/{r}"])]
                    ranks = self._agree(dict.fromkeys(absent, "never joined the run"))
                    self._reach().add("informed", 1)
                    self._keep_store(joined)
                    which = f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
                    raise MissingProcess(
                        f"{which} of {self.world_size} never joined the run: {self._self} waited "
                        f"{_seconds(self.timeout)} (distributed.timeout_minutes); check that every "
                        "machine started its processes, and what they said"
                    )
                time.sleep(self.interval / 4)
        except (RuntimeError, OSError) as error:
            raise MissingProcess(
                f"process {self.keeper}, which keeps the processes' store, left before all "
                f"{self.world_size} had joined the run: {self._self} waited for them"
            ) from error
        self._start = time.monotonic()  # about the same moment everywhere
        self._thread.start()

    def explain(self, error: BaseException) -> str | None:
        """Name the missing processes after a collective call failed; None if no process is missing.

        All surviving processes give the same names: the first one that knows writes them.
        """
        place = self.place[1]
        self._state = _WAITS
        self._wake.set()
        self._known.wait(2 * self.patience + 1)
        if self._missing is None:
            return self._without_store(place)
        if self._missing:
            return self._message(self._missing, place)
        if isinstance(error, dist.DistBackendError):
            return None  # a fault of the device, or of what it was asked
        return (
            f"the connection between the processes broke, though all {self.world_size} live: "
            f"{self._self}, {place}: {one_line(error)}; check the network; go on with --resume"
        )

    def leave(self, how: str) -> None:
        """Stop the heartbeats and write the reason."""
        store_hangs = self._state == _WAITS and not self._known.is_set()
        self._state = how
        self._out.set()
        self._wake.set()
        self._thread.join(0 if store_hangs else self.patience + 2)
        self._line.close()

    def _run(self) -> None:
        try:
            while not (self._out.is_set() or self._learns()):
                self._beat()
                if self.keeper is not None and self.rank != self.keeper:
                    last = self._read([self.keeper])[self.keeper]
                    if self._kept is None or last.number != self._kept[0].number:
                        self._kept = last, time.monotonic()
                if self._state == _WAITS:
                    self._look()
                    self._known.set()
                    break
                self._wake.wait(self.interval)
                self._wake.clear()
            self._reach().add("informed", 1)
            if self._missing is not None and not self._known.is_set():
                # This process may be the missing one, or wait in a call that nothing interrupts.
                place = self.place[1]
                self._known.set()
                if not self._out.wait(self.patience):
                    self._keep_store(self.world_size)
                    self._end(self._message(self._missing, place))
            self._out.wait()
            self._beat()
            self._keep_store(self.world_size)
        except (RuntimeError, OSError):  # the store is gone
            self._known.set()
            # After the keeper has ended normally the others do not wait for long.
            if self._missing is None and not self._out.wait(self.timeout):
                self._end(self._without_store(self.place[1]))

    def _reach(self) -> dist.Store:
        """The store. PyTorch prints a C++ traceback if it is gone, so this is checked before.

        Raises:
            ConnectionError: it is gone.
        """
        try:
            if not self._line.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError
        except BlockingIOError:
            pass
        return self._store

    def _beat(self) -> None:
        self._number += 1
        now = time.monotonic()
        step, place, came = self.place
        clock, since = now - self._start, now - came
        beat = Beat(self._name, self._number, clock, step, place, since, self._state)
        self._reach().set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def _read(self, ranks: list[int]) -> dict[int, Beat]:
        values = self._reach().multi_get([f"beat/{rank}" for rank in ranks])
        return {r: Beat(**json.loads(value)) for r, value in zip(ranks, values, strict=True)}

    def _learns(self) -> bool:
        """Whether some process has found the missing ranks."""
        if self._reach().check(["missing"]):
            self._agree({})
        return self._missing is not None

    def _agree(self, found: Mapping[int, str]) -> dict[int, str]:
        """The findings of the first process that has any; this process's if it is the first."""
        answer = json.loads(self._reach().compare_set("missing", "", json.dumps(found)))
        self._missing = {int(rank): said for rank, said in answer.items()}
        return self._missing

    def _look(self) -> None:
        """Find the missing ranks; takes as long as every live process needs for a heartbeat."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = self._read(others)
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            if self._learns():
                return
            time.sleep(self.interval / 2)
            self._beat()
        self._agree(self._judge(before, self._read(others)))

    def _judge(self, before: Mapping[int, Beat], now: Mapping[int, Beat]) -> dict[int, str]:
        clock = time.monotonic() - self._start
        gone = {
            rank: beat.fault(max(clock - beat.clock, 0.0))
            for rank, beat in now.items()
            if beat.has_left or beat.number == before[rank].number
        }
        if gone:
            return gone
        # All live. Name those that are behind, else those that made no call, else those elsewhere.
        step = self.place[0]
        running = [rank for rank, beat in now.items() if beat.state == _RUNNING]
        behind = [rank for rank in running if now[rank].step < step]
        elsewhere = [rank for rank, beat in now.items() if beat.step != step]
        return {
            rank: f"{now[rank].process} lives, but did not come: for {_seconds(now[rank].since)}, "
            f"{now[rank].place}"
            for rank in behind or running or elsewhere
        }

    def _keep_store(self, processes: int) -> None:
        """As its keeper, wait until so many processes know what this one knows, or have ended."""
        until = time.monotonic() + self.patience
        while self.rank == self.keeper and self._reach().add("informed", 0) < processes:
            if time.monotonic() > until:
                return
            time.sleep(self.interval / 4)

    def _end(self, message: str) -> None:
        for thread in threading.enumerate():  # a checkpoint that is being written
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(60)
        for child in multiprocessing.active_children():
            child.kill()
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_MISSING)

    def _message(self, missing: Mapping[int, str], place: str) -> str:
        """The error; also into the log, if this is the first of the processes that are left."""
        end = (
            f"{self._self} waited for it, {place} (distributed.timeout_minutes "
            f"{self.timeout / 60:g}); go on with --resume"
        )
        if self.rank in missing:
            end = f"the others gave it up after {_seconds(self.timeout)}"
        message = "; ".join([*missing.values(), end])
        left = set(range(self.world_size)) - set(missing)
        if self.log is not None and self.rank == min(left, default=None):
            with suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y/%m/%d %H:%M:%S')} - ERROR - {message}\n")
        return message

    def _without_store(self, place: str) -> str:
        if self.keeper is None or self._kept is None:
            return self._message({-1: "the launcher's store does not answer any more"}, place)
        beat, heard = self._kept
        role = ", which keeps the processes' store,"
        return self._message({self.keeper: beat.fault(time.monotonic() - heard, role)}, place)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
