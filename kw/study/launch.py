"""Start runs: several at a time, through torchrun, or as an array of slurm jobs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from ..config import imports
from ..errors import EXIT_INTERRUPTED, UserError
from ..training.interruption import on_signals
from .runs import Run, RunError, State, find_state, locked, note_jobs, reason, record
from .settings import differences, read_settings, resolved_text

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("none", "torchrun", "slurm")


def command_for(runs: Sequence[Run], launcher: str = "none", gpus: int | None = None) -> list[str]:
    """The words of the command that trains a run, or with ``slurm`` submits all runs.

    Args:
        runs: of one folder; a single one unless the launcher is slurm.
        launcher: one of :data:`LAUNCHERS`.
        gpus: processes of torchrun, or GPUs of a job's machine; None leaves it to the scripts.

    Raises:
        RunError: the launcher's script is not here, or slurm's cannot use one of the paths.
    """
    python = f"PYTHON={sys.executable}"
    given = [word for name in imports.GIVEN for word in ("--import", name)]
    if launcher == "slurm":
        home = runs[0].home.absolute()
        configs = [str(run.resolved.absolute()) for run in runs]
        if any(" " in path for path in (str(home), *configs)):
            raise RunError(
                f"--work-dir {runs[0].home}: scripts/train.slurm takes no path with spaces"
            )
        into = " ".join([*given, f"--work-dir {home}/{{name}}"])
        words = ["env", python, f"OPTIONS={into}", "sbatch", "--parsable"]
        words += ["--export", "ALL"]  # SBATCH_EXPORT may be NONE, and PYTHON and OPTIONS missing
        words += ["--array", f"0-{len(runs) - 1}", "--job-name", home.name]
        words += ["--output", f"{home}/launch/slurm-%A_%a.out"]
        if gpus is not None:
            words += ["--ntasks-per-node", str(gpus), "--gpus-per-node", str(gpus)]
        return [*words, _script("train.slurm"), *configs]
    (run,) = runs
    rest = [str(run.config.absolute()), *given, "--work-dir", str(run.work_dir.absolute())]
    options = ["--cfg-options", *run.options] if run.options else []
    if launcher == "torchrun":
        processes = [] if gpus is None else [f"PROCESSES={gpus}"]
        return ["env", python, *processes, _script("train.sh"), *rest, *options]
    return [sys.executable, "-m", "kw", "train", *rest, "--resume", *options]


def _script(name: str) -> str:
    path = ROOT / "scripts" / name
    if not path.is_file():
        raise RunError(f"no such file: {path}: a checkout has it; --launcher none needs none")
    return str(path)


def unfinished(runs: Iterable[Run]) -> Iterator[tuple[Run, State]]:
    """The runs that are not done, with their states."""
    for run in runs:
        state = find_state(run)
        if state.kind != "done":
            yield run, state


def run_all(
    runs: Sequence[Run],
    launcher: str = "none",
    gpus: int | None = None,
    *,
    jobs: int = 1,
    threads: int | None = None,
) -> int:
    """Train the runs that are not done, in order; a failure does not stop the others.

    Args:
        runs: what to train; a run that needs another comes after it.
        launcher: ``"none"`` or ``"torchrun"``.
        gpus: processes of torchrun.
        jobs: how many run at a time.
        threads: CPU threads of each; None leaves them to the environment.

    Returns:
        An exit status: 0 if all are done, 1 if one failed or waits for another's, 75 if the rest
        was interrupted or is run by another process.
    """
    if launcher == "torchrun":
        _script("train.sh")  # or every run would look for it
    trainings = _Trainings(launcher, gpus, threads)
    with on_signals(trainings.stop), ThreadPoolExecutor(jobs) as pool:
        for number, run in enumerate(runs, 1):
            label = f"[{number}/{len(runs)}] {run.name}"
            trainings.ends[run.work_dir] = pool.submit(trainings.train, run, label)
        ends = {path.name: future.result() for path, future in trainings.ends.items()}
    if failed := [name for name, status in ends.items() if status == 1]:
        _say(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", 1)
    return 1 if failed else max(ends.values(), default=0)


def _say(text: str, status: int = 0) -> None:
    # One write: two runs may start at the same time.
    print(f"{text}\n", end="", flush=True, file=sys.stderr if status == 1 else sys.stdout)


class _Trainings:
    """Trainings started by this process, in its threads; a signal to end is forwarded to them."""

    def __init__(self, launcher: str, gpus: int | None, threads: int | None) -> None:
        self.command = partial(command_for, launcher=launcher, gpus=gpus)
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self.environment = {**os.environ, **own}
        self.ends: dict[Path, Future[int]] = {}  # exit statuses by work directory
        self.asked = False  # to end
        self.children: set[subprocess.Popen[bytes]] = set()

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for child in list(self.children):
            child.send_signal(signal.SIGTERM)

    def train(self, run: Run, label: str) -> int:
        """Train one run, after the one that it needs; its exit status as run_all counts it."""
        # Runs start in order, so that the one before has a thread already.
        before = None if run.needs is None else self.ends.get(run.needs.parent)
        status = 0 if before is None else before.result()
        if self.asked:
            return EXIT_INTERRUPTED
        if status != 0:
            assert run.needs is not None
            how = "failed" if status == 1 else "is not done"
            said = f"left out, {run.needs.parent.name} {how}"
        else:
            try:
                with locked(run) as descriptor:
                    status, said = self._train(run, label, descriptor)
            except RunError as error:
                status, said = EXIT_INTERRUPTED, str(error)
        _say(f"{label}: {said}", status)
        return status

    def _train(self, run: Run, label: str, descriptor: int) -> tuple[int, str]:
        """Train one run if it is not done; its exit status, and how it ended."""
        state = find_state(run, ours=True)
        if obstacle := _obstacle(run, state):
            return 1, obstacle
        if state.kind == "done":
            run.finished.touch()  # a launcher that was killed may not have come to it
            return 0, "done already"
        if state.kind in ("queued", "running"):
            return EXIT_INTERRUPTED, str(state)
        run.work_dir.mkdir(parents=True, exist_ok=True)
        _say(f"{label}: {'goes on' if state.epochs else 'begins'}; output in {run.output}")
        command = self.command([run])
        began = time.monotonic()
        with open(run.output, "ab") as output:
            start = output.tell()
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            status = self._wait(command, output, descriptor)
        if self.asked and status != 0:
            status = EXIT_INTERRUPTED
        why = reason(run.output, start) if status else ""
        record(run, status, why)
        if status == 0:
            return 0, f"finished in {(time.monotonic() - began) / 60:.1f} minutes"
        if status == EXIT_INTERRUPTED:
            return status, "interrupted; run the same command again"
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        return 1, f"failed ({ended}): {why}"

    def _wait(self, command: list[str], output: IO[bytes], descriptor: int) -> int:
        """Run a command to its end; it inherits the run's lock."""
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self.environment,
            pass_fds=(descriptor,),
        )
        self.children.add(child)
        if self.asked:  # between the question and the start
            child.send_signal(signal.SIGTERM)
        try:
            return child.wait()
        finally:
            self.children.discard(child)


def submit(runs: Sequence[Run], gpus: int | None) -> int:
    """Put what is not done into slurm's queue, one array for the runs of a folder.

    Returns:
        An exit status: 0, or 1 if a run waits for another's or has other settings.

    Raises:
        RunError: slurm is not here, or refuses.
    """
    if shutil.which("sbatch") is None:
        raise RunError("--launcher slurm: there is no sbatch here; use none or torchrun")
    status = 0
    chosen: dict[Path, list[Run]] = {}
    for run, state in unfinished(runs):
        if obstacle := _obstacle(run, state):
            _say(f"{run.name}: {obstacle}", 1)
            status = 1
        elif state.kind in ("queued", "running"):
            _say(f"{run.name}: {state}")
        else:
            chosen.setdefault(run.home, []).append(run)
    # Of an interactive job, these would bind the new jobs' processes to its processors.
    users = ("SLURM_CONF", "SLURM_CLUSTERS")
    kept = {k: v for k, v in os.environ.items() if k in users or not k.startswith("SLURM_")}
    for own in chosen.values():
        command = command_for(own, "slurm", gpus)
        for run in own:
            run.resolved.parent.mkdir(parents=True, exist_ok=True)
            run.resolved.write_text(resolved_text(run.config, run.options), "utf-8")
        done = subprocess.run(
            command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RunError(f"sbatch refused ({done.returncode}): {done.stderr.strip()}")
        array = done.stdout.strip().split(";")[0]  # --parsable: JOB[;CLUSTER]
        for run in own:
            run.file("json").unlink(missing_ok=True)
        note_jobs(own, array)
        _say(f"job {array}: {', '.join(run.name for run in own)}")
    if not chosen:
        _say("nothing to submit")
    return status


def _obstacle(run: Run, state: State) -> str | None:
    """Why a run cannot be started: it was begun with other settings, or waits for another."""
    begun = run.work_dir / f"config{run.config.suffix}"
    # A run that ended before its first checkpoint starts again, with any settings.
    if begun.is_file() and any(run.work_dir.glob("epoch_*.pth")):
        try:
            different = differences(read_settings(begun), read_settings(run.config, run.options))
        except UserError as error:
            return f"{begun} cannot be read: {error}"
        if different:
            return (
                f"{run.work_dir} was begun with other settings ({'; '.join(different)}): give "
                "those, choose another --work-dir, or delete it"
            )
    return str(state) if state.kind == "waits" else None
