"""One training run of a study or of a published table: its files, its lock and its state."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EXIT_INTERRUPTED, UserError
from ..training.saving import write_json

# A tool's message about a mistake, or an exception. torchrun adds one of its own after either.
_ERRORS = (re.compile("error: "), re.compile(r"(?!torch\.distributed)[\w.]*(Error|Exception)\b"))
_EPOCHS = re.compile(r"^epochs\s*[:=]\s*(\d+)\s*$", re.MULTILINE)


class RunError(UserError):
    """A run cannot be started."""


@dataclass(frozen=True)
class Run:
    """One training: a row with a seed."""

    row: str
    seed: int
    home: Path  # folder of the runs of its study or table
    name: str  # of its work directory
    config: Path
    options: tuple[str, ...] = ()  # a.b=value, over the configuration's settings
    needs: Path | None = None  # a file of another run's work directory that must exist first

    @property
    def work_dir(self) -> Path:
        """What ``kw train`` writes into."""
        return self.home / self.name

    @property
    def output(self) -> Path:
        """The training's output."""
        return self.work_dir / "output.txt"

    @property
    def finished(self) -> Path:
        """Empty file that marks the end of the run."""
        return self.work_dir / "finished"

    @property
    def resolved(self) -> Path:
        """The configuration with the options in it, for launchers that take files alone."""
        return self.home / "launch" / "configs" / f"{self.name}{self.config.suffix}"

    def file(self, suffix: str) -> Path:
        """A file that the launcher writes: ``lock``, ``json`` (how the run ended)."""
        return self.home / "launch" / f"{self.name}.{suffix}"


@dataclass(frozen=True)
class State:
    """The state of a run."""

    kind: str  # not run, waits, queued, running, interrupted, failed, done
    epoch: int = 0  # epochs evaluated
    epochs: int = 0  # of the whole run; 0 where nothing has begun
    why: str = ""  # of a failure, or what it waits for

    def __str__(self) -> str:
        where = f" at epoch {self.epoch} of {self.epochs}" if self.epochs else ""
        why = f": {self.why}" if self.why else ""
        return f"{self.kind}{'' if self.kind in ('done', 'not run') else where}{why}"


@contextmanager
def locked(run: Run) -> Iterator[int]:
    """Lock a run; yields the file descriptor, which a started process should inherit.

    The lock is the open file's: it is held until the last process that has it open ends, so that a
    training whose launcher was killed keeps it.

    Raises:
        RunError: another process holds the lock.
    """
    path = run.file("lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run.work_dir}: another process is running it") from None
        except OSError:  # the file system has no locks, which the training says
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def _is_held(run: Run) -> bool:
    # Read alone: the runs may be another user's, or on a disk that cannot be written.
    try:
        with open(run.file("lock"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def record(run: Run, status: int, why: str = "") -> None:
    """Write down how an attempt ended: its exit status, 75 where it saved its work and left, and
    its last error."""
    path = run.file("json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"status": status, "why": why}, path)
    if status == 0:
        run.finished.touch()


def reason(log: Path, start: int = 0) -> str:
    """The reason why a process ended, from its output after ``start`` bytes of earlier attempts.

    It is the last line in which a tool names a mistake; else an exception's; else the last line
    that is not empty.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - 2**16))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    said = [line for line in lines if line]
    for pattern in _ERRORS:
        if found := [line for line in said if pattern.match(line)]:
            return found[-1].removeprefix("error: ")[:300]
    return said[-1][:300] if said else ""


def note_jobs(runs: Sequence[Run], array: str) -> None:
    """Note that job ``i`` of an array of slurm trains ``runs[i]``; all are of one folder."""
    path = runs[0].home / "launch" / "jobs.json"
    jobs = _object(_text(path)) | {run.name: f"{array}_{i}" for i, run in enumerate(runs)}
    path.write_text(json.dumps(jobs, indent=1) + "\n")


def _job(run: Run) -> tuple[str, Path | None]:
    """Slurm's state of a run's last job, empty if it is not in the queue; the job's output."""
    job = _object(_text(run.home / "launch" / "jobs.json")).get(run.name)
    if job is None:
        return "", None
    output = run.home / "launch" / f"slurm-{job}.out"
    if shutil.which("squeue") is None:
        return "", output
    # -r: one line for each job of an array. squeue fails for jobs that slurm no longer knows.
    command = ["squeue", "-h", "-r", "-o", "%i %T", "-j", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        said = f"squeue does not say whether job {job} runs ({done.stderr.strip()}): try again"
        raise RunError(f"{run.name}: {said}")
    found = re.search(rf"^\s*{job}\s+(\w+)", done.stdout, re.MULTILINE)
    return found[1] if found else "", output


def find_state(run: Run, *, ours: bool = False) -> State:
    """The state of a run, from its files, its lock (unless it is ``ours``) and slurm's queue.

    Raises:
        RunError: slurm does not answer, and may have a job of the run.
    """
    epoch, epochs = _progress(run.work_dir)
    ended = _object(_text(run.file("json")))
    status, why = ended.get("status"), ended.get("why", "")
    if not ours and _is_held(run):
        return State("running", epoch, epochs)
    whole = epochs and epoch == epochs and (run.work_dir / "results.json").is_file()
    last = run.work_dir / f"epoch_{epochs}.pth"
    if run.finished.exists() or (whole and (status == 0 or _has_figures(last))):
        return State("done", epoch, epochs)
    job, output = _job(run)
    if job:
        return State("running" if job in ("RUNNING", "COMPLETING") else "queued", epoch, epochs)
    if run.needs is not None and not run.needs.is_file() and not epochs:
        return State("waits", why=f"for {run.needs}")
    if status not in (None, 0, EXIT_INTERRUPTED):
        return State("failed", epoch, epochs, why)
    if status is not None:
        output = None  # of an earlier attempt
    said = reason(output) if output else ""
    if epochs or status is not None:
        return State("interrupted", epoch, epochs, said)
    if output is not None:
        return State("failed", why=said or f"job ended; see {output}")
    return State("not run")


def _has_figures(checkpoint: Path) -> bool:
    """Whether it was written after its epoch's evaluation; one may have been written before."""
    with suppress(Exception):  # there is none, or a damaged one
        state = torch.load(checkpoint, "cpu", weights_only=True, mmap=True)  # reads no tensor
        return state["meta"]["metrics"] is not None
    return False


def _progress(work_dir: Path) -> tuple[int, int]:
    """Epochs evaluated, and of the whole run."""
    found = _EPOCHS.search(_text(work_dir / "config.yaml") or _text(work_dir / "config.py"))
    lines = [line for line in _text(work_dir / "log.jsonl").splitlines() if '"val"' in line]
    entries = [entry for entry in map(_object, lines) if entry.get("mode") == "val"]
    return (entries[-1].get("epoch", 0) if entries else 0), (int(found[1]) if found else 0)


def _text(path: Path) -> str:
    """A file's text; empty if there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty if there is none, or it was cut off while it was written."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
