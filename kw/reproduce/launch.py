"""Starting a table's runs: one after another, with torchrun, or as an array of slurm jobs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import EXIT_INTERRUPTED, UserError
from .compare import conflict
from .runs import Reproduction, Run, read_settings
from .state import Jobs, Outcome, RunError, State, find_state, locked, reason, record

__all__ = ["LAUNCHERS", "Command", "command_for", "run_all", "submit", "unfinished"]

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("none", "torchrun", "slurm")


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        words: program and arguments.
        variables: of the environment, besides those that are there.
    """

    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a shell takes it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*settings, shlex.join(self.words)])


def command_for(runs: Sequence[Run], launcher: str, gpus: int | None) -> Command:
    """The command that trains a run, or with ``slurm`` the one that submits all of them.

    Args:
        runs: of one table; a single one unless the launcher is slurm.
        launcher: one of :data:`LAUNCHERS`.
        gpus: processes of torchrun, or GPUs of a job's machine; None leaves it to the scripts.

    Raises:
        RunError: slurm's script cannot take a path.
    """
    configs = [str(run.config.absolute()) for run in runs]
    python = {"PYTHON": sys.executable}
    if launcher == "slurm":
        target = str(runs[0].home.absolute() / "{name}")
        launch = runs[0].file("log").parent.absolute()
        if any(" " in path for path in (target, *configs)):
            raise RunError(
                f"--work-dir {runs[0].home}: scripts/train.slurm takes no path with spaces"
            )
        array = f"0-{len(runs) - 1}"
        words = ["sbatch", "--parsable", "--array", array, "--job-name", runs[0].home.name]
        words += ["--output", f"{launch}/slurm-%A_%a.out"]
        if gpus is not None:
            words += ["--ntasks-per-node", str(gpus), "--gpus-per-node", str(gpus)]
        words += [str(ROOT / "scripts/train.slurm"), *configs]
        return Command(words, {**python, "OPTIONS": f"--work-dir {target}"})
    (run,), (config,) = runs, configs
    target = str(run.work_dir.absolute())
    if launcher == "torchrun":
        processes = {} if gpus is None else {"PROCESSES": str(gpus)}
        words = [str(ROOT / "scripts/train.sh"), config, "--work-dir", target]
        return Command(words, {**python, **processes})
    words = [sys.executable, "-m", "kw", "train", config, "--work-dir", target, "--resume"]
    return Command(words)


def unfinished(task: Reproduction, runs: Iterable[Run]) -> Iterator[tuple[Run, State]]:
    """The runs that are not done, with what became of them so far."""
    jobs: dict[Path, Jobs] = {}
    for run in runs:
        state = find_state(run, jobs.setdefault(run.home, Jobs(run.home)), task.waits_for(run))
        if state.kind != "done":
            yield run, state


class _Stop:
    """Passes a request to end on to the training under way, and remembers it."""

    def __init__(self) -> None:
        self.asked = False
        self.child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)


def run_all(
    task: Reproduction,
    runs: Sequence[Run],
    launcher: str,
    gpus: int | None,
    say: Callable[[str], None],
) -> int:
    """Train what is not done, one run after another; a failure does not stop the others.

    Args:
        task: the reproduction.
        runs: of it.
        launcher: ``"none"`` or ``"torchrun"``.
        gpus: processes of torchrun.
        say: told of every run.

    Returns:
        An exit status: 0 if all are done, 1 if one failed or waits for another table's, 75 if the
        rest was interrupted or is run by another process.

    Raises:
        ConfigError: the settings of a run are wrong; nothing was started then.
    """
    texts = _resolve(task, runs)
    ends: set[int] = set()
    stop = _Stop()
    with stop.watched():
        for number, run in enumerate(runs, 1):
            if stop.asked:
                ends.add(EXIT_INTERRUPTED)
                break
            label = f"[{number}/{len(runs)}] {run.name}"
            try:
                ends.add(_run(task, run, texts[run], launcher, gpus, stop, label, say))
            except RunError as error:
                say(f"{label}: {error}")
                ends.add(EXIT_INTERRUPTED)
    return 1 if 1 in ends else max(ends, default=0)


def _run(
    task: Reproduction,
    run: Run,
    text: str,
    launcher: str,
    gpus: int | None,
    stop: _Stop,
    label: str,
    say: Callable[[str], None],
) -> int:
    """Train one run if it is not done; its exit status as :func:`run_all` counts it."""
    with locked(run) as descriptor:
        state = find_state(run, Jobs(run.home), task.waits_for(run), ours=True)
        other = _settings_conflict(run, text)
        if other is not None:
            say(f"{label}: {other}")
            return 1
        if state.kind == "done":
            say(f"{label}: done already")
            return 0
        if state.kind in ("waits", "queued", "running"):
            say(f"{label}: {state}")
            return 1 if state.kind == "waits" else EXIT_INTERRUPTED
        _write(run, text)
        log = run.file("log")
        say(f"{label}: {'goes on' if state.epochs else 'begins'}; output in {log}")
        start = log.stat().st_size if log.exists() else 0
        command = command_for([run], launcher, gpus)
        with open(log, "ab") as output:
            output.write(f"$ {command}\n".encode())
            output.flush()
            status = _wait(command, output, descriptor, stop)
        if stop.asked and status != 0:
            status = EXIT_INTERRUPTED
        why = reason(log, start) if status else ""
        record(run, Outcome(status, why))
    if status == 0:
        say(f"{label}: done")
        return 0
    if status == EXIT_INTERRUPTED:
        say(f"{label}: interrupted; run the same command again")
        return EXIT_INTERRUPTED
    ended = f"signal {-status}" if status < 0 else f"status {status}"
    say(f"{label}: failed ({ended}): {why}")
    return 1


def _wait(command: Command, output: Any, descriptor: int, stop: _Stop) -> int:
    """Run a command to its end; it inherits the lock."""
    stop.child = subprocess.Popen(
        command.words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **command.variables},
        pass_fds=(descriptor,),
    )
    if stop.asked:  # between the question and the start
        stop.child.send_signal(signal.SIGTERM)
    try:
        return stop.child.wait()
    finally:
        stop.child = None


def submit(
    task: Reproduction, runs: Sequence[Run], gpus: int | None, say: Callable[[str], None]
) -> int:
    """Put what is not done into slurm's queue, one array for the runs of a table.

    Returns:
        An exit status: 0, or 1 if a run waits for another table's or has other settings.

    Raises:
        RunError: slurm is not here, or refuses.
        ConfigError: the settings of a run are wrong; nothing was submitted then.
    """
    if shutil.which("sbatch") is None:
        raise RunError("--launcher slurm: there is no sbatch here; use none or torchrun")
    texts = _resolve(task, runs)
    status = 0
    chosen: dict[Path, list[Run]] = {}
    for run, state in unfinished(task, runs):
        other = _settings_conflict(run, texts[run])
        if other is not None or state.kind == "waits":
            say(f"{run.name}: {other or state}")
            status = 1
        elif state.kind in ("queued", "running"):
            say(f"{run.name}: {state}")
        else:
            chosen.setdefault(run.home, []).append(run)
    for home, own in chosen.items():
        for run in own:
            _write(run, texts[run])
        command = command_for(own, "slurm", gpus)
        variables = {**os.environ, **command.variables}
        done = subprocess.run(
            command.words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RunError(f"sbatch refused ({done.returncode}): {done.stderr.strip()}")
        array = done.stdout.strip().split(";")[0]  # --parsable: JOB[;CLUSTER]
        for run in own:
            run.file("json").unlink(missing_ok=True)
        Jobs(home).add(array, [run.name for run in own])
        say(f"job {array}: {', '.join(run.name for run in own)}")
    if not chosen:
        say("nothing to submit")
    return status


def _resolve(task: Reproduction, runs: Sequence[Run]) -> dict[Run, str]:
    """The configurations of all runs, before any is started."""
    data = task.prepare_data() if runs else None
    return {run: task.resolve(run, data) for run in runs}


def _write(run: Run, text: str) -> None:
    run.config.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text(text)


def _settings_conflict(run: Run, text: str) -> str | None:
    """What keeps a run from going on with these settings: it was begun with others."""
    begun = run.work_dir / f"config{run.config.suffix}"
    # One that ended before its first checkpoint begins anew, with any settings.
    if not begun.is_file() or not any(run.work_dir.glob("epoch_*.pth")):
        return None
    candidate = run.config.with_name(f"{run.name}_new{run.config.suffix}")
    candidate.parent.mkdir(parents=True, exist_ok=True)
    candidate.write_text(text)
    try:
        different = conflict(read_settings(begun), read_settings(candidate))
    except UserError as error:
        return f"{begun} cannot be read: {error}"
    finally:
        candidate.unlink()
    if not different:
        return None
    return (
        f"{run.work_dir} was begun with other settings ({'; '.join(different)}): give those, "
        "choose another --work-dir, or delete it"
    )
