"""Several processes that train one network: what the engine's own update takes on them.

Processes of a machine share its memory and its cores. Each number of processes is therefore also
measured without communication, every process for itself: the difference is what communication
costs. Both, and all numbers of processes, are interleaved.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from ...config.schema import Config
from ...data import BatchPreprocessor
from ...engine import set_contraction
from ...engine.distributed import Process, process_group
from ...engine.optim import UpdateWrapper, build_optimizer
from ...engine.parallel import wrap_ddp
from ...models import ImageClassifier, build_network
from ..conditions import BenchmarkError
from ..steps import LEARNING_RATE

__all__ = ["Measurement", "Plan", "measure_processes"]

_TIMEOUT = timedelta(minutes=10)
_SWEEP = tuple(2**power for power in (12, 16, 20, 22, 24, 26))  # bytes


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        config: the network and how it is trained; its ``batch_size`` is a process's.
        processes: numbers of processes.
        rounds: interleaved.
        warm_up: updates before those that are timed; DDP settles its buckets in them.
        updates: timed, in each round.
        threads: of each process's operators on CPU.
    """

    config: Config
    processes: tuple[int, ...]
    rounds: int = 3
    warm_up: int = 2
    updates: int = 3
    threads: int = 1

    def check(self) -> None:
        """Refuse what this machine cannot do.

        Raises:
            BenchmarkError: fewer GPUs than processes; less than one process.
        """
        if min(self.processes) < 1:
            raise BenchmarkError(f"--processes {min(self.processes)}: expected at least 1")
        if torch.cuda.is_available() and torch.cuda.device_count() < max(self.processes):
            raise BenchmarkError(
                f"--processes {max(self.processes)}: this machine has {torch.cuda.device_count()} "
                "GPU(s), and every process needs its own; ask for fewer"
            )


@dataclass
class Measurement:
    """Seconds of an update, one figure a round, by the number of processes.

    Attributes:
        together: with DDP, the mean over the processes.
        apart: every process for itself, all at once, the mean over the processes.
        reduce: of an all-reduce by bytes, the median over repetitions.
        buckets: of DDP, bytes, after the warm-up.
    """

    together: dict[int, list[float]] = field(default_factory=dict)
    apart: dict[int, list[float]] = field(default_factory=dict)
    reduce: dict[int, dict[int, float]] = field(default_factory=dict)
    buckets: dict[int, list[int]] = field(default_factory=dict)


def measure_processes(plan: Plan) -> Measurement:
    """Start the processes, measure, and end them.

    Raises:
        BenchmarkError: see :meth:`Plan.check`.
    """
    plan.check()
    world = max(plan.processes)
    with multiprocessing.Manager() as manager:
        answer = manager.dict()
        multiprocessing.spawn(_work, (plan, world, _free_port(), answer), world)
        return answer["measurement"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(rank: int, plan: Plan, world: int, port: int, answer: Any) -> None:
    """One process's part."""
    torch.set_num_threads(plan.threads)
    board = _Board(rank, world, port)
    worker = _Worker(rank, plan, board)
    found = Measurement()
    for _ in range(plan.rounds):
        for count in plan.processes:
            seconds = worker.updates(count, together=False)
            found.apart.setdefault(count, []).append(board.average(seconds, count))
            seconds = worker.updates(count, together=True)
            found.together.setdefault(count, []).append(board.average(seconds, count))
    for count in plan.processes:
        found.buckets[count] = worker.buckets.get(count, [])
        if count > 1:
            found.reduce[count] = worker.sweep(count)
    board.meet("end")
    if rank == 0:
        answer["measurement"] = found
    board.meet("answered")


class _Board:
    """What the processes tell each other beside the group that is measured."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        self.rank, self.world = rank, world
        self.store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=_TIMEOUT)
        self.step = 0

    def meet(self, name: str) -> None:
        """Wait until all processes are here; waiting needs no core."""
        self.step += 1
        key = f"{self.step}_{name}"
        if self.store.add(key, 1) == self.world:
            self.store.set(f"{key}_go", "1")
        self.store.wait([f"{key}_go"])

    def average(self, seconds: float, count: int) -> float:
        """The mean over the first ``count`` processes."""
        self.meet("measured")
        self.store.set(f"{self.step}_{self.rank}", repr(seconds))
        self.meet("told")
        keys = [f"{self.step - 1}_{rank}" for rank in range(count)]
        return mean(float(self.store.get(key)) for key in keys)

    def port(self) -> int:
        """A port for the next group, the same for all."""
        self.meet("port")
        key = f"{self.step}_port_is"
        if self.rank == 0:
            self.store.set(key, str(_free_port()))
        return int(self.store.get(key))


class _Worker:
    """A process with its network, which it keeps from group to group."""

    def __init__(self, rank: int, plan: Plan, board: _Board) -> None:
        self.rank, self.plan, self.board = rank, plan, board
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", rank)
            torch.cuda.set_device(self.device)
        config = plan.config
        torch.manual_seed(0)
        network = build_network(config.model)
        set_contraction(config.contraction, network)
        if config.channels_last:
            network = network.to(memory_format=torch.channels_last)
        network.to(self.device).train()
        preprocessor = BatchPreprocessor(
            config.data,
            config.model.num_classes,
            config.label_smoothing,
            config.seed,
            config.channels_last,
        )
        self.model = ImageClassifier(network, preprocessor).to(self.device)
        optimizer = build_optimizer(network, config.optimizer, self.device)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.wrapper = UpdateWrapper(
            optimizer, 1, config.optimizer.clip_grad, config.precision, self.device.type
        )
        size, batch = config.data.input_size, config.batch_size
        self.batch = {
            "images": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8),
            "labels": torch.randint(config.model.num_classes, (batch,)),
            "key": (0, 0),
        }
        self.buckets: dict[int, list[int]] = {}

    def updates(self, count: int, together: bool) -> float:
        """Seconds of an update on ``count`` processes, of which this need not be one."""
        timed = 0.0

        def run(process: Process) -> None:
            nonlocal timed
            model: Any = self.model
            if process.world_size > 1:
                model = wrap_ddp(model, process, self.plan.config.distributed.bucket_mb)
            timed = self._time(model)
            if isinstance(model, nn.parallel.DistributedDataParallel):
                log = model._get_ddp_logging_data()
                sizes = log.get("rebuilt_bucket_sizes") or log.get("bucket_sizes", "")
                self.buckets[count] = [int(size) for size in str(sizes).split(",") if size.strip()]

        if together and count > 1:
            self._in_group(count, run)
        else:
            self.board.meet("begin")
            if self.rank < count:
                run(Process(0, 1, self.device))
        return timed

    def sweep(self, count: int) -> dict[int, float]:
        """Seconds of all-reduces on ``count`` processes that do nothing else, by bytes."""
        found: dict[int, float] = {}

        def run(process: Process) -> None:
            for size in _SWEEP:
                tensor = torch.zeros(size // 4, device=self.device)
                times = [self._timed(lambda own=tensor: dist.all_reduce(own)) for _ in range(9)]  # type: ignore[misc]
                found[size] = median(times[2:])

        self._in_group(count, run)
        return found

    def _in_group(self, count: int, run: Callable[[Process], None]) -> None:
        port = self.board.port()
        if self.rank < count:
            names = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": count}
            os.environ.update({key: str(value) for key, value in names.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            with process_group("pytorch", self.plan.config.distributed.timeout_minutes) as process:
                run(process)
        self.board.meet("left")

    def _time(self, model: Any) -> float:
        for _ in range(self.plan.warm_up):
            model.train_step(self.batch, optim_wrapper=self.wrapper)

        def update() -> None:
            for _ in range(self.plan.updates):
                model.train_step(self.batch, optim_wrapper=self.wrapper)

        return self._timed(update) / self.plan.updates

    def _timed(self, action: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
