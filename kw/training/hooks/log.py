"""What a run says: a progress line, ``log.jsonl`` and what its loggers are given."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...warehouse import has_temperature
from ..checkpoint import replacing
from ..distributed import host_barrier
from ..logs import logger
from ..task import Metrics
from ..trainer import Trainer
from .base import Hook

_waiting: dict[Path, bytes] = {}  # lines that could not be written, by file
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Of network disks and mounted clouds: https://github.com/googlecolab/colabtools/issues/3441
_PASSING |= {errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}


class LogHook(Hook):
    """Sums losses on the device and reads them when a line is due: no update waits for the device.

    Values that are not finite are left out of the means: such updates are skipped, and counted as
    ``skipped``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of the finite values, and their number: [2]
        self._skipped: int | None = None  # updates skipped up to the last line

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last line."""
        return {"sums": dict(self._sums), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._sums, self._skipped = dict(state["sums"]), state["skipped"]

    def before_training(self, trainer: Trainer) -> None:
        device = trainer.process.device
        self._sums = {key: value.to(device) for key, value in self._sums.items()}
        if self._skipped is None:
            self._skipped = trainer.updater.guard.read().total
        self._anneals = has_temperature(trainer.task.network)
        self._trained = (0.0, 0)  # seconds and updates since this process started
        if trainer.process.is_main:
            evaluated = trainer.epoch - trainer.unevaluated
            _forget_after(trainer.work_dir / "log.jsonl", trainer.update, evaluated)
            for line in _describe(trainer):
                logger.info(line)

    def before_epoch(self, trainer: Trainer) -> None:
        self._start_clock(trainer)

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        if trainer.updater.grad_norm is not None:
            losses = {**losses, "grad_norm": trainer.updater.grad_norm}
        for key, value in losses.items():
            finite = torch.isfinite(value)
            pair = torch.stack([torch.where(finite, value, 0).float(), finite.float()])
            self._sums[key] = pair + self._sums[key] if key in self._sums else pair
        self._updates += 1
        if trainer.line_is_due:
            self._write_training(trainer)

    def after_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        found = {key: value for key, value in metrics.items() if value is not None}
        parts = [
            f"{key} {value:.{0 if key.endswith(('images', 'classes')) else 3}f}"
            for key, value in found.items()
        ]
        logger.info(f"epoch {trainer.epoch}/{trainer.config.epochs} evaluated: {', '.join(parts)}")
        self._record(trainer, "val", trainer.epoch, found)

    def after_training(self, trainer: Trainer) -> None:
        if trainer.board is None:  # the main process has one
            return
        best = "no best epoch"
        if trainer.best >= 0:
            best = f"best {trainer.task.score} {trainer.best:.3f}"
        written = "best.pth, last.pth, results.json, log.jsonl"
        if "tensorboard" in trainer.config.loggers:
            written += ", tensorboard/"
        logger.info(f"done, {best}; in {trainer.work_dir}: {written}")
        results = trainer.work_dir / "results.json"
        of_best = json.loads(results.read_text()) if results.is_file() else {}
        if temperature := of_best.get("temperature"):
            logger.warning(
                f"best.pth is of an epoch at temperature {temperature:g}: annealing went on"
            )

    def close(self, trainer: Trainer) -> None:
        if _waiting:
            with suppress(OSError):  # there is no later line
                add_text(trainer.work_dir / "log.jsonl", "")
            _waiting.clear()

    def _start_clock(self, trainer: Trainer) -> None:
        self._started, self._updates = time.perf_counter(), 0
        trainer.data_seconds = 0.0

    def _write_training(self, trainer: Trainer) -> None:
        epoch, done = trainer.epoch + 1, trainer.updates_of_epoch
        sums = torch.stack(list(self._sums.values()))  # [names, 2]
        if trainer.process.world_size > 1:
            host_barrier(f"in update {done} of epoch {epoch}, at its log line")
            dist.all_reduce(sums)
        # The only place where training waits for the device. Without a finite value: NaN.
        means = (sums[:, 0] / sums[:, 1]).tolist()
        values: dict[str, float] = dict(zip(self._sums, means, strict=True))
        skipped = trainer.updater.guard.read().total
        values["skipped"] = skipped - (self._skipped or 0)
        self._skipped = skipped
        values["lr"] = trainer.optimizer.param_groups[0]["lr"]
        if self._anneals:
            values["temperature"] = trainer.schedule.temperature(trainer.update - 1)
        # A resumed run's sums go back further than its clock.
        seconds, updates = time.perf_counter() - self._started, self._updates
        values["images_per_second"] = updates * trainer.config.total_batch_size / seconds
        values["seconds"] = seconds
        values["data_time"] = trainer.data_seconds / updates
        self._trained = self._trained[0] + seconds, self._trained[1] + updates
        left = trainer.schedule.total_updates - trainer.update
        remaining = left * self._trained[0] / self._trained[1]
        logger.info(
            f"epoch {epoch}/{trainer.config.epochs} [{done}/{trainer.updates_per_epoch}] "
            + " ".join(f"{key} {value:.4g}" for key, value in values.items() if value)
            + f" eta {timedelta(seconds=round(remaining))}"
        )
        self._record(trainer, "train", epoch, values)
        self._sums = {}
        self._start_clock(trainer)

    def _record(self, trainer: Trainer, mode: str, epoch: int, values: dict[str, float]) -> None:
        if trainer.board is None:  # the main process has one
            return
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        # NaN is not JSON.
        line = {**dict.fromkeys(values), **finite}
        write_line(trainer.work_dir, mode, epoch, trainer.update, line)
        named = {f"{mode}/{key}": value for key, value in finite.items()}
        trainer.board.scalars(named, trainer.update)


def _describe(trainer: Trainer) -> Iterator[str]:
    """What is about to be trained, and where it writes."""
    config, task = trainer.config, trainer.task
    loaders = (trainer.train_loader, trainer.val_loader)
    train, val = (f"{len(loader.dataset):,}" for loader in loaders)
    yield f"data: {train} images to train on, {val} to test on, {len(task.classes):,} classes"
    parameters = list(task.network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    where = f"{config.precision} on {trainer.process.device.type}"
    yield f"network: {total:,} parameters{frozen}; {where}"
    batches = f"updates of {config.total_batch_size} images, {config.batch_size} at a time"
    yield f"{batches} in each of {trainer.process.world_size} process(es)"
    schedule = trainer.schedule
    yield (
        f"{schedule.total_updates} updates, {schedule.updates_per_epoch} an epoch; "
        f"{schedule.warmup_updates} of them warm up"
    )
    yield f"writes into {trainer.work_dir}"


def write_line(work_dir: Path, mode: str, epoch: int, update: int, values: dict[str, Any]) -> None:
    """Add a line to ``log.jsonl``; for the main process."""
    entry = {"mode": mode, "epoch": epoch, "iter": update, **values}
    add_text(work_dir / "log.jsonl", json.dumps(entry) + "\n")


def add_text(path: Path, text: str) -> None:
    """Add lines to a file. A full disk, or one that is out of reach for a while, does not end the
    run: they are then written with a later line, of this file or another of its folder, or at the
    end of the run."""
    # Names that are not UTF-8 are written as the bytes that they are.
    _waiting[path] = _waiting.get(path, b"") + text.encode("utf-8", "surrogateescape")
    for each in [each for each in _waiting if each.parent == path.parent]:
        try:
            with open(each, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(_waiting[each]) < len(_waiting[each]):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, "No space left for the whole line")
            del _waiting[each]
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            logger.error(f"{each}: cannot be written now: {error.strerror}")


def _forget_after(path: Path, update: int, epoch: int) -> None:
    """Drop what a resumed run makes again, and a line that was cut off in the writing; so many
    updates are done, and so many epochs with their evaluations."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        of_evaluation = "val" in (entry["mode"], entry.get("split"))  # of a bad image
        if entry["epoch"] <= epoch if of_evaluation else entry["iter"] <= update:
            kept.append(line + "\n")
    with replacing(path) as partial:
        partial.write_text("".join(kept))
