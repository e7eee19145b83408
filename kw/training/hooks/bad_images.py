"""Image files that could not be read: each is logged once over all processes, up to a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ...data.faults import BadImage
from ..distributed import from_all, host_barrier
from ..logs import logger
from ..state import fault_logs
from ..task import Metrics
from ..trainer import Trainer
from .base import Hook
from .log import add_text, write_line

INSTEAD = {"train": "another image takes its place", "val": "it counts as wrong"}


class BadImageHook(Hook):
    """Names every bad file in the log, in ``log.jsonl`` and in ``bad_images.txt``.

    Processes exchange names when a log line is due, where training waits for the device anyway.
    """

    def before_training(self, trainer: Trainer) -> None:
        if trainer.process.is_main:
            (trainer.work_dir / "bad_images.txt").unlink(missing_ok=True)
            for split, log in fault_logs(trainer).items():
                _list(trainer, split, log.known.values())

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        if trainer.line_is_due:
            epoch = trainer.epoch + 1
            place = f"in update {trainer.updates_of_epoch} of epoch {epoch}, naming bad images"
            self._exchange(trainer, "train", epoch, place)

    def after_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        self._exchange(trainer, "val", trainer.epoch, "in the evaluation, naming bad images")

    def _exchange(self, trainer: Trainer, split: str, epoch: int, place: str) -> None:
        """Exchange what each process found.

        Raises:
            DataError: too many files are bad; on all processes.
        """
        host_barrier(place)
        log = fault_logs(trainer)[split]
        new = log.merge(fault for share in from_all(log.take()) for fault in share)
        if not new:
            return
        if trainer.process.is_main:
            for _, path, reason in new:
                shown = path.encode("utf-8", "backslashreplace").decode()
                logger.warning(f"cannot read {shown}: {reason}; {INSTEAD[split]}")
                line = {"split": split, "path": path, "reason": reason}
                write_line(trainer.work_dir, "bad_image", epoch, trainer.update, line)
            _list(trainer, split, new)
        log.check()


def _list(trainer: Trainer, split: str, faults: Iterable[BadImage]) -> None:
    """Lines of ``bad_images.txt``: split, file and reason, with tabs between."""
    if lines := [f"{split}\t{path}\t{reason}\n" for _, path, reason in faults]:
        add_text(trainer.work_dir / "bad_images.txt", "".join(lines))
