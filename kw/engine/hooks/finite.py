"""When too many updates were not finite, a run stops and says where it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.hooks import Hook

from ...config.run_schema import NonFiniteConfig
from ...registry import HOOKS
from ..diagnosis import find_origin
from ..finite import NonFiniteError, Skipped
from ..optim import autocast
from ..saving import checkpoints
from .log import write_line

__all__ = ["FiniteHook"]


@HOOKS.register_module()
class FiniteHook(Hook):
    """Reads the guard's counts when a log line is due (:class:`kw.engine.finite.FiniteGuard`).

    Between lines nothing is at risk: skipped updates leave the run as it was.

    Args:
        config: how many updates may be skipped.
        interval: updates between readings; an epoch's last update always gives one.
    """

    priority = "VERY_LOW"  # after the log's line

    def __init__(self, config: NonFiniteConfig, interval: int) -> None:
        self.config = config
        self.interval = interval
        self._waits = False  # for the next update that is skipped, to have its images in hand
        self._total = 0

    def before_train(self, runner: Any) -> None:
        self._total = runner.optim_wrapper.guard.read().total

    def before_train_epoch(self, runner: Any) -> None:
        if runner.iter == runner.epoch * runner.train_loop.updates_per_epoch:
            runner.optim_wrapper.guard.begin_epoch()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        done, updates = batch_idx + 1, runner.train_loop.updates_per_epoch
        if done % self.interval and done != updates and not self._waits:
            return
        skipped = runner.optim_wrapper.guard.read()
        if skipped.total > self._total:
            runner.logger.warning(
                f"update {runner.iter + 1}: {skipped.total - self._total} of the updates since the "
                f"last line skipped, loss or gradient was not finite; {skipped.total} in all"
            )
            self._total = skipped.total
        most = max(self.config.patience, int(self.config.max_fraction * updates))
        self._waits = skipped.in_a_row >= self.config.patience or skipped.in_epoch > most
        if self._waits and skipped.in_a_row:
            self._stop(runner, skipped)

    def _stop(self, runner: Any, skipped: Skipped) -> None:
        """Look for the layer, in the update that was just skipped; all processes together."""
        origin = self._origin(runner)
        origins = [origin]
        if runner.process.world_size > 1:
            origins = [None] * runner.process.world_size
            dist.all_gather_object(origins, origin)
        found = {rank: each for rank, each in enumerate(origins) if each is not None}
        where = next(iter(found.values()), None)
        update = runner.iter + 1
        checkpoint = next(reversed(checkpoints(Path(runner.work_dir))), None)
        report = {
            "skipped": skipped.total,
            "in_a_row": skipped.in_a_row,
            "origin": where,
            "rank": next(iter(found), None),
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }
        if runner.process.is_main:
            write_line(runner, "non_finite", runner.epoch + 1, update, report)
        raise NonFiniteError(_message(runner, skipped, update, where, found, checkpoint))

    def _origin(self, runner: Any) -> str | None:
        config = runner.config
        try:
            return find_origin(
                runner.task.model,
                runner.task.network,
                runner.train_loop.batches,
                lambda: autocast(config.precision, runner.process.device.type),
            )
        except Exception as error:  # a search that fails must not hide what it is about
            runner.logger.warning(f"the search for the layer: {type(error).__name__}: {error}")
            return None


def _message(
    runner: Any,
    skipped: Skipped,
    update: int,
    where: str | None,
    found: dict[int, str],
    checkpoint: Path | None,
) -> str:
    began = "a second pass of this update's images did not show in which layer it began"
    if where is not None:
        ranks = (
            f" (on process {', '.join(map(str, found))})" if runner.process.world_size > 1 else ""
        )
        began = f"it began{ranks} in {where}"
    last = "there is no checkpoint yet"
    if checkpoint is not None:
        last = f"the last good checkpoint is {checkpoint}"
    return (
        f"loss or gradient not finite: stopped in epoch {runner.epoch + 1} at update {update}, "
        f"after {skipped.in_a_row} skipped updates in a row and {skipped.in_epoch} in this epoch "
        f"(non_finite.patience {runner.config.non_finite.patience}); {began}; the skipped updates "
        f"changed nothing, {last}"
    )
