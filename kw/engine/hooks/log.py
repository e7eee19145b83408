"""What a run says: a progress line, ``log.jsonl`` and TensorBoard scalars."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ...registry import HOOKS
from ...warehouse import has_temperature
from ..distributed import host_barrier
from ..task import Metrics

__all__ = ["LogHook", "write_line"]


@HOOKS.register_module()
class LogHook(Hook):
    """Sums losses on the device and reads them when a line is due: no update waits for the device.

    Values that are not finite are left out of the means: such updates are skipped, and counted as
    ``skipped``.

    Args:
        interval: updates between lines; an epoch's last update always gives one.
    """

    priority = "LOW"

    def __init__(self, interval: int) -> None:
        self.interval = interval

        self._sums: dict[str, Tensor] = {}  # of the finite values, and their number: [2]
        self._updates = 0
        self._skipped: int | None = None  # updates skipped up to the last line

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last line."""
        return {"sums": dict(self._sums), "updates": self._updates, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._sums = dict(state["sums"])
        self._updates, self._skipped = state["updates"], state["skipped"]

    def before_train(self, runner: Any) -> None:
        device = runner.process.device
        self._sums = {key: value.to(device) for key, value in self._sums.items()}
        if self._skipped is None:
            self._skipped = runner.optim_wrapper.guard.read().total
        self._anneals = has_temperature(runner.task.network)
        self._seconds = 0.0  # of training alone, since this process started
        self._updates_timed = 0
        self._file: Path | None = None
        if runner.process.is_main:
            self._file = Path(runner.work_dir, "log.jsonl")
            _forget_after(self._file, runner.iter, runner.epoch)
            for line in _describe(runner):
                runner.logger.info(line)
            runner.board = SummaryWriter(
                str(Path(runner.work_dir, "tensorboard")),
                purge_step=runner.iter + 1 if runner.iter else None,
            )

    def before_train_epoch(self, runner: Any) -> None:
        self._start_clock(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any, outputs: dict[str, Tensor]
    ) -> None:
        if runner.optim_wrapper.grad_norm is not None:
            outputs = {**outputs, "grad_norm": runner.optim_wrapper.grad_norm}
        for key, value in outputs.items():
            finite = torch.isfinite(value)
            pair = torch.stack([torch.where(finite, value, 0).float(), finite.float()])
            self._sums[key] = pair + self._sums[key] if key in self._sums else pair
        self._updates += 1
        done = batch_idx + 1
        if done % self.interval == 0 or done == runner.train_loop.updates_per_epoch:
            self._write_training(runner, done)

    def after_epoch(self, runner: Any, metrics: Metrics | None) -> None:
        if metrics is None:
            return
        found = {key: value for key, value in metrics.items() if value is not None}
        parts = [
            f"{key} {value:.{0 if key.endswith('images') else 3}f}" for key, value in found.items()
        ]
        runner.logger.info(
            f"epoch {runner.epoch}/{runner.max_epochs} evaluated: {', '.join(parts)}"
        )
        self._record(runner, "val", runner.epoch, runner.iter, found)

    def after_train(self, runner: Any) -> None:
        if runner.board is not None:
            runner.board.close()

    def _start_clock(self, runner: Any) -> None:
        self._started = time.perf_counter()
        runner.train_loop.data_seconds = 0.0

    def _write_training(self, runner: Any, done: int) -> None:
        sums = torch.stack(list(self._sums.values()))  # [names, 2]
        if runner.process.world_size > 1:
            host_barrier(f"in update {done} of epoch {runner.epoch + 1}, at its log line")
            dist.all_reduce(sums)
        # The only place where training waits for the device. Without a finite value: NaN.
        means = (sums[:, 0] / sums[:, 1]).tolist()
        values: dict[str, float] = dict(zip(self._sums, means, strict=True))
        skipped = runner.optim_wrapper.guard.read().total
        values["skipped"] = skipped - (self._skipped or 0)
        self._skipped = skipped
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self._updates_timed += self._updates  # those before a resume were not timed here
        update = runner.iter + 1
        values["lr"] = runner.optim_wrapper.optimizer.param_groups[0]["lr"]
        if self._anneals:
            values["temperature"] = runner.schedule.temperature(runner.iter)
        values["images_per_second"] = (
            self._updates * runner.config.total_batch_size / max(seconds, 1e-9)
        )
        values["seconds"] = seconds
        values["data_time"] = runner.train_loop.data_seconds / self._updates
        remaining = (runner.max_iters - update) * self._seconds / self._updates_timed
        runner.logger.info(
            f"epoch {runner.epoch + 1}/{runner.max_epochs} "
            f"[{done}/{runner.train_loop.updates_per_epoch}] "
            + " ".join(f"{key} {value:.4g}" for key, value in values.items())
            + f" eta {timedelta(seconds=round(remaining))}"
        )
        self._record(runner, "train", runner.epoch + 1, update, values)
        self._sums, self._updates = {}, 0
        self._start_clock(runner)

    def _record(
        self, runner: Any, mode: str, epoch: int, update: int, values: dict[str, float]
    ) -> None:
        if self._file is None or runner.board is None:
            return
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        # NaN is not JSON.
        _append(self._file, mode, epoch, update, {**dict.fromkeys(values), **finite})
        for key, value in finite.items():
            runner.board.add_scalar(f"{mode}/{key}", value, update)


def _describe(runner: Any) -> Iterator[str]:
    """What is about to be trained, and where it writes."""
    config, task = runner.config, runner.task
    loaders = (runner.train_dataloader, runner.val_dataloader)
    train, val = (f"{len(loader.dataset):,}" for loader in loaders)
    yield f"data: {train} images to train on, {val} to test on, {len(task.classes):,} classes"
    parameters = list(task.network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    where = f"{config.precision} on {runner.process.device.type}"
    yield f"network: {total:,} parameters{frozen}; {where}"
    batches = f"updates of {config.total_batch_size} images, {config.batch_size} at a time"
    yield f"{batches} in each of {runner.process.world_size} process(es)"
    yield f"writes into {runner.work_dir}"


def write_line(runner: Any, mode: str, epoch: int, update: int, values: dict[str, Any]) -> None:
    """Add a line to ``log.jsonl``; for the main process."""
    _append(Path(runner.work_dir, "log.jsonl"), mode, epoch, update, values)


def _append(path: Path, mode: str, epoch: int, update: int, values: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps({"mode": mode, "epoch": epoch, "iter": update, **values}) + "\n")


def _forget_after(path: Path, update: int, epoch: int) -> None:
    """Drop what a resumed run makes again, and a line that was cut off in the writing.

    Args:
        path: the log.
        update: updates done.
        epoch: epochs done, evaluation and all.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        done = entry["epoch"] <= epoch if entry["mode"] == "val" else entry["iter"] <= update
        if done:
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
