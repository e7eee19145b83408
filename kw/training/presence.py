"""Heartbeats identify dead or hung ranks.

A thread of each process writes a heartbeat into the store that the process group was built with.
Training itself does not use the store; the thread reads an attribute that says where training is.
The store is read only when a collective call fails, for a few heartbeats. A process whose heartbeat
no longer changes is dead, stopped or cut off; a process whose heartbeat changes is alive at another
place. Each process measures ages by its own clock, so the clocks of hosts may differ.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..errors import EXIT_MISSING, MissingProcess, one_line

__all__ = ["Beat", "Presence", "is_of_communication", "log_to", "set_place", "watched"]

_GLOO = re.compile(
    r"gloo/|Timed out waiting \d+ms|Connection (closed|reset) by peer|Connection refused"
    r"|Application timeout caused pair closure|Broken pipe|Socket closed"
)
_ENDED = re.compile(r"was killed by SIGTERM|is killed by signal: Terminated")
_RUNNING, _WAITS, _SEEN = "running", "waits", "seen"
_current: Presence | None = None


@dataclass(frozen=True)
class Beat:
    """One heartbeat of a process.

    Attributes:
        number: count of heartbeats.
        clock: seconds since the processes joined.
        step: count of places so far; equal on processes that do the same work.
        place: what the process is doing.
        since: seconds since it began that.
        state: ``running``; ``waits``: a collective call failed; ``seen``: it also knows which
            process is missing; or the reason why it left.
    """

    number: int
    clock: float
    step: int
    place: str
    since: float
    state: str
    host: str
    pid: int

    @property
    def runs(self) -> bool:
        return self.state == _RUNNING

    @property
    def has_left(self) -> bool:
        return self.state not in (_RUNNING, _WAITS, _SEEN)


def set_place(place: str) -> None:
    """Set what this process is doing, for messages of other processes; an attribute write.

    All processes must call this in the same order: one that does not is reported as lost.
    """
    if _current is not None:
        _current.at(place)


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
    """Send heartbeats inside the context, and name the missing process when a call fails.

    Raises:
        MissingProcess: a process died, hangs, or is not where the others are.
    """
    global _current
    _current = presence
    presence.start()
    how = "had ended its run"
    try:
        yield
    except MissingProcess:
        how = _SEEN
        raise
    except BaseException as error:
        how = f"ended with {one_line(error)}"
        # A launcher that lost another process ends ours, its loader's processes too.
        if not (_is_or_follows(error, is_of_communication) or _is_or_follows(error, _was_ended)):
            raise
        message = presence.explain(error)
        if message is None:
            raise
        how = _SEEN
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
        self.timeout = timeout
        self.keeper = keeper
        self.interval = min(1.0, timeout.total_seconds() / 10)
        # As long as this, a heartbeat may fail to come under load.
        self.patience = max(1.0, 3 * self.interval)
        self.log: Path | None = None
        self._store = dist.PrefixStore("presence", store)
        self._line = line
        self._line.setblocking(False)
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._start = time.monotonic()
        self._place = (0, "before the run began", self._start)
        self._state = _RUNNING
        self._number = 0
        self._asks_who_is_gone = False  # and not who is late
        self._is_deaf = False  # the store does not answer
        self._missing: list[dict[str, Any]] | None = None
        self._kept: tuple[Beat, float] | None = None  # the keeper's last heartbeat, and when
        self._wake, self._known, self._out = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def at(self, place: str) -> None:
        """Note where this process is."""
        self._place = (self._place[0] + 1, place, time.monotonic())

    def join(self) -> None:
        """Wait until all processes are there.

        Raises:
            MissingProcess: some did not come in time.
        """
        until = time.monotonic() + self.timeout.total_seconds()
        try:
            self._beat()
            if self._reach().add("joined", 1) == self.world_size:
                self._reach().set("complete", "")
            while not self._reach().check(["complete"]):
                if self._reach().check(["absent"]) or time.monotonic() > until:
                    raise MissingProcess(self._absent())
                time.sleep(self.interval / 4)
        except (RuntimeError, OSError) as error:
            raise MissingProcess(
                f"process {self.keeper}, which keeps the processes' store, left before all "
                f"{self.world_size} had joined the run: {self._self()} waited for them"
            ) from error
        self._start = time.monotonic()  # about the same moment everywhere

    def start(self) -> None:
        """Start sending heartbeats."""
        self._thread.start()

    def explain(self, error: BaseException) -> str | None:
        """Name the missing processes after a collective call failed; None for other errors.

        All surviving processes give the same names: the first one that knows writes them.
        """
        place = self._place[1]
        self._asks_who_is_gone = not _is_or_follows(error, is_of_communication)
        self._state = _WAITS
        self._wake.set()
        self._known.wait(2 * self.patience + 1)
        if self._missing is None:
            if self._asks_who_is_gone:
                return None
            self._is_deaf = True
            return self._tell(self._without_store(place), [{"rank": self.keeper}])
        if self._missing:
            return self._tell(self._message(self._missing, place), self._missing)
        if self._asks_who_is_gone or isinstance(error, dist.DistBackendError):
            return None  # a fault of the device, or of what it was asked
        return (
            f"the connection between the processes broke, though all {self.world_size} live: "
            f"{self._self()}, {place}: {one_line(error)}; check the network; go on with --resume"
        )

    def leave(self, how: str) -> None:
        """Stop the heartbeats and write the reason."""
        self._state = how
        self._out.set()
        self._wake.set()
        self._thread.join(0 if self._is_deaf else self.patience + 2)
        self._line.close()

    def _run(self) -> None:
        try:
            while not self._out.is_set():
                self._beat()
                self._watch_keeper()
                if self._learn():
                    break
                if self._state == _WAITS:
                    self._look()
                    break
                self._wake.wait(self.interval)
                self._wake.clear()
            if self._missing is not None:
                if not self._known.is_set():  # training itself has not noticed yet
                    self._end_if_stuck()
                self._out.wait()
            self._beat()
            self._linger()
        except (RuntimeError, OSError):  # the store is gone
            self._known.set()
            # After a keeper's good end nothing keeps the others for long.
            if self._missing is None and not self._out.wait(self.timeout.total_seconds()):
                self._end(self._without_store(self._place[1]), [{"rank": self.keeper}])

    def _absent(self) -> str:
        """Who did not join; those who did say the same, and leave together."""
        store = self._reach()
        ranks = [r for r in range(self.world_size) if not store.check([f"beat/{r}"])]
        ranks = json.loads(store.compare_set("absent", "", json.dumps(ranks)))
        store.add("told", 1)
        until = time.monotonic() + self.patience
        while self.rank == self.keeper and store.add("told", 0) < store.add("joined", 0):
            if time.monotonic() > until:
                break
            time.sleep(self.interval / 4)
        which = f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return (
            f"{which} of {self.world_size} never joined the run: {self._self()} waited "
            f"{self._limit()} (distributed.timeout_minutes); check that every machine started its "
            "processes, and what they said"
        )

    def _reach(self) -> dist.Store:
        """The store. PyTorch writes a C++ traceback when it finds it gone: look before.

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
        step, place, came = self._place
        clock = now - self._start
        beat = Beat(
            self._number, clock, step, place, now - came, self._state, self._host, self._pid
        )
        self._reach().set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def _read(self, ranks: list[int]) -> dict[int, Beat]:
        values = self._reach().multi_get([f"beat/{rank}" for rank in ranks])
        return {r: Beat(**json.loads(value)) for r, value in zip(ranks, values, strict=True)}

    def _watch_keeper(self) -> None:
        if self.keeper is not None and self.rank != self.keeper:
            beat = self._read([self.keeper])[self.keeper]
            if self._kept is None or beat.number != self._kept[0].number:
                self._kept = beat, time.monotonic()

    def _learn(self) -> bool:
        """Whether some process has found out who is missing."""
        if self._reach().check(["missing"]):
            self._missing = json.loads(self._reach().get("missing"))
        return self._missing is not None

    def _look(self) -> None:
        """Find out who is missing, over so long that every living heart beats."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = self._read(others)
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            if self._learn():
                self._known.set()
                return
            time.sleep(self.interval / 2)
            self._beat()
        found = self._judge(before, self._read(others))
        if found or not self._asks_who_is_gone:  # else it is our own affair, not the others'
            found = json.loads(self._reach().compare_set("missing", "", json.dumps(found)))
        self._missing = found
        self._known.set()

    def _judge(self, before: Mapping[int, Beat], now: Mapping[int, Beat]) -> list[dict[str, Any]]:
        step = self._place[0]
        clock = time.monotonic() - self._start
        found: dict[int, str] = {}
        for rank, beat in now.items():
            age = max(clock - beat.clock, 0.0)
            if beat.has_left:
                found[rank] = f"{beat.state}, {_seconds(age)} ago, {beat.place}"
            elif beat.number == before[rank].number:
                found[rank] = f"is dead or stopped: last heard from {_seconds(age)} ago"
                found[rank] += f", {beat.place}"
        # Of those that live: who is behind, else who did not call, else who called from elsewhere.
        alive = {rank: beat for rank, beat in now.items() if rank not in found}
        candidates = (
            [rank for rank, beat in alive.items() if beat.runs and beat.step < step],
            [rank for rank, beat in alive.items() if beat.runs],
            [rank for rank, beat in alive.items() if beat.step != step],
        )
        if not found and not self._asks_who_is_gone:
            for rank in next((ranks for ranks in candidates if ranks), []):
                beat = alive[rank]
                found[rank] = f"lives, but did not come: for {_seconds(beat.since)}, {beat.place}"
        return [
            {
                "rank": rank,
                "host": now[rank].host,
                "pid": now[rank].pid,
                "how": how,
                "lives": rank in alive,
            }
            for rank, how in sorted(found.items())
        ]

    def _linger(self) -> None:
        """Keep the store until the others know what this process knows, or have ended as well."""
        if self.rank != self.keeper:
            return
        dead = {each["rank"] for each in self._missing or () if not each["lives"]}
        others = [r for r in range(self.world_size) if r != self.rank and r not in dead]
        until = time.monotonic() + self.patience
        while time.monotonic() < until and others:
            if not any(beat.runs or beat.state == _WAITS for beat in self._read(others).values()):
                return
            time.sleep(self.interval / 4)

    def _end_if_stuck(self) -> None:
        """End this process, if it does not come out of what it does by itself.

        It may be the one that is missing, or wait in a call that nothing interrupts.
        """
        self._state, place = _SEEN, self._place[1]
        self._beat()
        self._known.set()
        if not self._out.wait(self.patience):
            self._linger()
            self._end(self._message(self._missing or [], place), self._missing or [])

    def _end(self, message: str, missing: list[dict[str, Any]]) -> None:
        self._tell(message, missing)
        for thread in threading.enumerate():  # a checkpoint that is being written
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(60)
        for child in multiprocessing.active_children():
            child.kill()
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_MISSING)

    def _message(self, missing: list[dict[str, Any]], place: str) -> str:
        parts = []
        for each in missing:
            who = f"process {each['rank']} of {self.world_size} ({each['host']}, pid {each['pid']})"
            parts.append(f"{who} {each['how']}")
        if self.rank in [each["rank"] for each in missing]:
            return f"{'; '.join(parts)}; the others gave it up after {self._limit()}"
        return f"{'; '.join(parts)}; {self._waited(place)}"

    def _tell(self, message: str, missing: list[dict[str, Any]]) -> str:
        """Into the log, if this is the first of those that are left."""
        left = set(range(self.world_size)) - {each["rank"] for each in missing}
        if self.log is not None and self.rank == min(left, default=None):
            with suppress(OSError), open(self.log, "a") as file:
                file.write(f"{time.strftime('%Y/%m/%d %H:%M:%S')} - ERROR - {message}\n")
        return message

    def _without_store(self, place: str) -> str:
        if self.keeper is None or self._kept is None:
            return f"the launcher's store does not answer any more; {self._waited(place)}"
        beat, heard = self._kept
        age = _seconds(time.monotonic() - heard)
        how = f"is dead or stopped: last heard from {age} ago"
        if beat.has_left:
            how = f"{beat.state}, {age} ago"
        return (
            f"process {self.keeper} of {self.world_size} ({beat.host}, pid {beat.pid}), which "
            f"keeps the processes' store, {how}, {beat.place}; {self._waited(place)}"
        )

    def _waited(self, place: str) -> str:
        return (
            f"{self._self()} waited for it, {place} (distributed.timeout_minutes "
            f"{self.timeout.total_seconds() / 60:g}); go on with --resume"
        )

    def _self(self) -> str:
        return f"this process, {self.rank} ({self._host}, pid {self._pid}),"

    def _limit(self) -> str:
        return _seconds(self.timeout.total_seconds())


def _was_ended(error: BaseException) -> bool:
    return _ENDED.search(str(error)) is not None


def _is_or_follows(error: BaseException, test: Callable[[BaseException], bool]) -> bool:
    """Whether an error, or what it was raised from, is of a kind."""
    return test(error) or (error.__cause__ is not None and test(error.__cause__))


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
