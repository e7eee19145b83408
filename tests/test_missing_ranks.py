"""When a process of a run is missing the others end soon, all with one message that names it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 -- mmengine imports it, here once for all processes
import pytest
import torch
import torch.utils.tensorboard
from kills import free_port

from kw.cli import run_tool
from kw.config import config_from_mapping
from kw.errors import EXIT_MISSING
from kw.training import evaluate_checkpoint, train
from kw.training.presence import is_of_communication

TIMEOUT = 2.0  # seconds
# A missing process is looked for over one second; the rest is for a busy machine.
SLACK = 10.0
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


class Run:
    """Processes of one run, each a fork with its output in files.

    Args:
        work: what a process does.
        folder: for what they say.
        world: number of processes.
        ranks: those that are started.
    """

    def __init__(
        self, work: Callable[[int], Any], folder: Path, world: int, ranks: list[int] | None = None
    ) -> None:
        self.folder = folder
        self.world = world
        port = free_port()
        context = multiprocessing.get_context("fork")
        self.processes = {
            rank: context.Process(target=self._work, args=(work, rank, port))
            for rank in (range(world) if ranks is None else ranks)
        }
        for process in self.processes.values():
            process.start()

    def _work(self, work: Callable[[int], Any], rank: int, port: int) -> None:
        torch.set_num_threads(1)
        os.setpgid(0, 0)  # with its loader's processes
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.world))
        run_tool(lambda: work(rank))

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def pid(self, rank: int) -> int:
        return int(self.processes[rank].pid or 0)

    def ends(self, ranks: list[int], within: float) -> None:
        """Wait for processes; each has to end with the status of a missing one, and one line."""
        until = time.monotonic() + within
        for rank in ranks:
            self.processes[rank].join(max(until - time.monotonic(), 0))
            assert self.processes[rank].exitcode == EXIT_MISSING, self.said(rank)
            assert "Traceback" not in self.said(rank)
            assert self.said(rank).count("error:") == 1, self.said(rank)

    def kill(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()


@pytest.fixture
def start(tmp_path: Path) -> Any:
    runs: list[Run] = []

    def begin(work: Any, *arguments: Any, folder: Path = tmp_path) -> Run:
        folder.mkdir(exist_ok=True)
        runs.append(Run(work, folder, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture
def config(settings: dict[str, Any]) -> dict[str, Any]:
    """A run without end, for two or three processes."""
    settings.update(epochs=10**5, total_batch_size=12, batch_size=2, log_interval=2)
    settings["distributed"] = {"timeout_minutes": TIMEOUT / 60}
    settings["data"]["workers"] = 1
    settings["temperature_epochs"] = 0
    del settings["model"]["kernel_warehouse"]
    return settings


def until_it_trains(run: Run, work_dir: Path) -> None:
    log = work_dir / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 2:
        assert all(process.is_alive() for process in run.processes.values()), run.said(0)
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for thread in threads for word in thread.read_text().split()]


def trainer(config: dict[str, Any], work_dir: Path) -> Callable[[int], Any]:
    return lambda rank: train(config_from_mapping(config), work_dir, launcher="pytorch")


PLACES = (
    "before the run began",  # where the last heartbeat that came may still be from
    "looking for a checkpoint",
    "in update [0-9]+ of epoch",
    "in the evaluation",
    "at the (start|end) of",
    "gathering",
)
PLACE = f"({'|'.join(PLACES)})"


@pytest.mark.parametrize(
    ("what", "lost"),  # processes of a run, and the one that is lost; 0 keeps the store
    [(signal.SIGKILL, [(2, 1), (3, 0)]), (signal.SIGSTOP, [(3, 2), (2, 0)])],
)
def test_dead_or_stopped(
    config: dict[str, Any],
    tmp_path: Path,
    start: Any,
    what: signal.Signals,
    lost: list[tuple[int, int]],
) -> None:
    folders = [tmp_path / f"{world}_{rank}" for world, rank in lost]
    runs = [
        start(trainer(config, folder), world, folder=folder)
        for (world, _), folder in zip(lost, folders, strict=True)
    ]
    for (_, rank), run in zip(lost, runs, strict=True):
        until_it_trains(run, run.folder)
        os.kill(run.pid(rank), what)
    for (world, rank), run in zip(lost, runs, strict=True):
        left = [r for r in range(world) if r != rank]
        # Who died closes its connections: nobody waits for the timeout.
        run.ends(left, (0 if what == signal.SIGKILL else TIMEOUT) + SLACK)
        named = rf"process {rank} of {world} \(.*pid {run.pid(rank)}\).* is dead or stopped: "
        for each in left:
            assert re.search(rf"{named}last heard from [\d.]+ s ago, {PLACE}", run.said(each))
            waits = rf"this process, {each} \(.*pid {run.pid(each)}\), waited for it, {PLACE}"
            assert re.search(waits, run.said(each))
        log = "".join(path.read_text() for path in run.folder.glob("*/*.log"))
        assert len(re.findall(named, log)) == 1


def test_stuck_in_its_loader(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """It lives, and says where it is; the others see that it does not come."""
    run = start(trainer(config, tmp_path / "run"), 3)
    until_it_trains(run, tmp_path / "run")
    for worker in children(run.pid(1)):
        os.kill(worker, signal.SIGSTOP)
    run.ends([0, 1, 2], TIMEOUT + SLACK)
    for rank in (0, 1, 2):
        named = rf"process 1 of 3 \(.*pid {run.pid(1)}\) lives, but did not come: for [\d.]+ s, "
        place = r"(in update \d+|at the start) of epoch \d+, loading images"
        assert re.search(named + place, run.said(rank))
    assert "the others gave it up" in run.said(1)
    assert not children(run.pid(1))


def test_left_early(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """One process's run is shorter than the others'."""

    def work(rank: int) -> Any:
        epochs = 1 if rank == 1 else 5
        return trainer({**config, "epochs": epochs}, tmp_path / "run")(rank)

    run = start(work, 3)
    run.ends([0, 2], 60)
    assert run.processes[1].exitcode == 0
    for rank in (0, 2):
        assert re.search(r"process 1 of 3 \(.*\) had ended its run, [\d.]+ s ago", run.said(rank))


def test_a_mistake_on_one_process(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """The process itself says what is wrong, the others that it ended with that."""

    def work(rank: int) -> Any:
        root = tmp_path / "nowhere" if rank == 2 else config["data"]["root"]
        data = {**config["data"], "root": str(root)}
        return trainer({**config, "data": data}, tmp_path / "run")(rank)

    run = start(work, 3)
    run.ends([0, 1], 60)
    assert run.processes[2].exitcode == 2
    for rank in (0, 1):
        assert re.search(r"process 2 of 3 \(.*\) ended with DataError: .*nowhere", run.said(rank))


def test_a_bug_stays_a_bug(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """On all processes at once: no process is missing."""

    def work(rank: int) -> Any:
        torch.nn.functional.cross_entropy = broken
        return trainer(config, tmp_path / "run")(rank)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    run = start(work, 2)
    for rank in (0, 1):
        run.processes[rank].join(60)
        assert run.processes[rank].exitcode == 1
        assert "RuntimeError: shapes do not fit" in run.said(rank)
        assert "this is a bug" in run.said(rank)


def test_never_joined(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """One that would keep the store, and one that would not."""
    runs = {
        absent: start(
            trainer(config, tmp_path / "run"),
            3,
            [rank for rank in range(3) if rank != absent],
            folder=tmp_path / str(absent),
        )
        for absent in (0, 2)
    }
    for absent, run in runs.items():
        run.ends(list(run.processes), TIMEOUT + SLACK)
        for rank in run.processes:
            assert re.search(rf"process {absent}\b.* never joined the run", run.said(rank))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]:9615.", True),
        ("Timed out waiting 600000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
        ("DataLoader timed out after 5 seconds", False),
    ],
)
def test_which_errors_are_of_communication(message: str, is_one: bool) -> None:
    assert is_of_communication(RuntimeError(message)) == is_one
    assert not is_of_communication(ValueError(message))


def test_evaluation(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """Of a checkpoint, as by tools/test.py: one process is stopped before its figures."""
    train(config_from_mapping({**config, "epochs": 1}), tmp_path / "run")

    def work(rank: int) -> Any:
        if rank == 1:
            stop_in_evaluation()
        checkpoint = tmp_path / "run" / "best.pth"
        return evaluate_checkpoint(config_from_mapping(config), checkpoint, launcher="pytorch")

    def stop(*_: Any, **__: Any) -> None:
        time.sleep(0.5)  # more than between two heartbeats
        os.kill(os.getpid(), signal.SIGSTOP)

    def stop_in_evaluation() -> None:
        torch.nn.functional.cross_entropy = stop

    run = start(work, 2)
    run.ends([0], 60)
    assert re.search(r"process 1 of 2 .* is dead or stopped: .* in the evaluation", run.said(0))
    assert "this process, 0 " in run.said(0)
    assert "at the end of an evaluation (distributed" in run.said(0)


def test_one_process_logs(config: dict[str, Any], tmp_path: Path, start: Any) -> None:
    """Of three: one line for every update that is due, one evaluation, one text log."""
    run = start(trainer({**config, "epochs": 2}, tmp_path / "run"), 3)
    for process in run.processes.values():
        process.join(60)
        assert process.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(x["mode"], x["iter"]) for x in lines] == [
        *(("train", update) for update in (2, 4, 5)),
        ("val", 5),
        *(("train", update) for update in (7, 9, 10)),
        ("val", 10),
    ]
    assert len(list((tmp_path / "run").glob("*/*.log"))) == 1
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert "epoch 2/2" in (tmp_path / "0.out").read_text()
    for rank in (1, 2):
        printed = (tmp_path / f"{rank}.out").read_text().splitlines()
        assert not [line for line in printed if not line.startswith("[Gloo]")]  # torch 2.9's
        assert run.said(rank) == ""
