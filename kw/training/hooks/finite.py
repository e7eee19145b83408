"""When too many updates were not finite, a run stops and says where it began."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ..diagnosis import find_origin
from ..distributed import from_all
from ..finite import NonFiniteError, Skipped
from ..logs import logger
from ..precision import autocast
from ..saving import checkpoints
from ..trainer import Trainer
from .base import Hook
from .log import write_line


class FiniteHook(Hook):
    """Reads the guard's counts when a log line is due (:class:`kw.training.finite.FiniteGuard`).

    Between lines nothing is at risk: skipped updates leave the run as it was. The line itself says
    how many there were.
    """

    def __init__(self) -> None:
        self._waits = False  # for the next update that is skipped, to have its images in hand

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        if not (self._waits or trainer.line_is_due):
            return
        skipped, bounds = trainer.updater.guard.read(), trainer.config.non_finite
        most = max(bounds.patience, int(bounds.max_fraction * trainer.updates_per_epoch))
        self._waits = skipped.in_a_row >= bounds.patience or skipped.in_epoch > most
        if self._waits and skipped.in_a_row:
            self._stop(trainer, skipped, bounds.patience)

    def _stop(self, trainer: Trainer, skipped: Skipped, patience: int) -> None:
        """Look for the layer, in the update that was just skipped; all processes together."""
        origins = from_all(self._origin(trainer))
        found = {rank: each for rank, each in enumerate(origins) if each is not None}
        rank, where = next(iter(found.items()), (None, None))
        began = "a second pass of this update's images did not show in which layer it began"
        if where is not None:
            ranks = f" (on process {', '.join(map(str, found))})" if len(origins) > 1 else ""
            began = f"it began{ranks} in {where}"
        checkpoint = next(map(str, reversed(checkpoints(trainer.work_dir))), None)
        last = f"the last good checkpoint is {checkpoint}"
        if checkpoint is None:
            last = "there is no checkpoint yet"
        if trainer.process.is_main:
            report = {
                "skipped": skipped.total,
                "in_a_row": skipped.in_a_row,
                "origin": where,
                "rank": rank,
                "checkpoint": checkpoint,
            }
            write_line(trainer.work_dir, "non_finite", trainer.epoch + 1, trainer.update, report)
        raise NonFiniteError(
            "loss or gradient not finite: "
            f"stopped in epoch {trainer.epoch + 1} at update {trainer.update}, after "
            f"{skipped.in_a_row} skipped updates in a row and {skipped.in_epoch} in this epoch "
            f"(non_finite.patience {patience}); {began}; the skipped updates "
            f"changed nothing, {last}"
        )

    def _origin(self, trainer: Trainer) -> str | None:
        context = partial(autocast, trainer.config.precision, trainer.process.device.type)
        try:
            return find_origin(trainer.task.model, trainer.task.network, trainer.batches, context)
        except Exception as error:  # a search that fails must not hide what it is about
            logger.warning(f"the search for the layer: {type(error).__name__}: {error}")
            return None
