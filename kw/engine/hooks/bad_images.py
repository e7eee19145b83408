"""Which image files could not be read: said once each, over all processes, up to a bound."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook

from ...data import BadImage, FaultLog, Loader
from ...registry import HOOKS
from .log import write_line

__all__ = ["BadImageHook", "fault_logs", "tell_bad_images"]

_INSTEAD = {"train": "another image takes its place", "val": "it counts as wrong"}


@HOOKS.register_module()
class BadImageHook(Hook):
    """Names every bad file in the log, in ``log.jsonl`` and in ``bad_images.txt``.

    Processes tell one another when a log line is due, where training waits for the device anyway.

    Args:
        interval: updates between tellings; an epoch's last update always gives one.
    """

    priority = "LOW"

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def before_train(self, runner: Any) -> None:
        if runner.process.is_main:
            _write_list(runner)  # of this run, not of one that was here before

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        done = batch_idx + 1
        if done % self.interval == 0 or done == runner.train_loop.updates_per_epoch:
            self._exchange(runner, "train", runner.epoch + 1, runner.iter + 1)

    def after_val(self, runner: Any) -> None:
        self._exchange(runner, "val", runner.epoch, runner.iter)

    def _exchange(self, runner: Any, split: str, epoch: int, update: int) -> None:
        """Tell all processes what each met.

        Raises:
            DataError: too many files are bad; on all processes.
        """
        log = fault_logs(runner)[split]
        new = log.learn(_of_all(runner, log.take()))
        if not new:
            return
        if runner.process.is_main:
            for _, path, reason in new:
                shown = path.encode("utf-8", "backslashreplace").decode()
                runner.logger.warning(f"cannot read {shown}: {reason}; {_INSTEAD[split]}")
                line = {"split": split, "path": path, "reason": reason}
                write_line(runner, "bad_image", epoch, update, line)
            _write_list(runner)
        log.check()


def fault_logs(runner: Any) -> dict[str, FaultLog]:
    """What is known of the files of a run's data sets."""
    loaders = {"train": runner.train_dataloader, "val": runner.val_dataloader}
    return {name: each.faults for name, each in loaders.items() if isinstance(each, Loader)}


def tell_bad_images(loader: Loader) -> None:
    """Warn of this process's bad files, after an evaluation without a run.

    Raises:
        DataError: they are too many.
    """
    for _, path, reason in loader.faults.learn(loader.faults.take()):
        warnings.warn(f"cannot read {path}: {reason}; {_INSTEAD['val']}", stacklevel=2)
    loader.faults.check()


def _of_all(runner: Any, met: list[BadImage]) -> list[BadImage]:
    if runner.process.world_size == 1:
        return met
    count = torch.tensor(len(met), device=runner.process.device)
    dist.all_reduce(count)
    if not count:
        return []
    gathered: list[Any] = [None] * runner.process.world_size
    dist.all_gather_object(gathered, met)
    return [BadImage(*fault) for share in gathered for fault in share]


def _write_list(runner: Any) -> None:
    """``bad_images.txt``: split, file and reason, with tabs between; no file if all are good."""
    path = Path(runner.work_dir, "bad_images.txt")
    lines = [
        f"{split}\t{fault.path}\t{fault.reason}\n"
        for split, log in fault_logs(runner).items()
        for fault in log.known.values()
    ]
    if lines:
        # Names that are not UTF-8 are written as the bytes that they are.
        path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    else:
        path.unlink(missing_ok=True)
