"""When checkpoints are written, which are kept, and the run's results."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from ...errors import Interrupted
from ...registry import HOOKS
from ..checkpoint import CheckpointError
from ..distributed import host_barrier
from ..interruption import Agreement
from ..saving import Writer, checkpoint_name, checkpoints, link
from ..task import Metrics, headline

__all__ = ["CheckpointHook", "write_json"]


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Writes checkpoints beside training and keeps the newest, ``last.pth`` and ``best.pth``.

    The best epoch is that of the highest score (:attr:`kw.engine.task.Task.score`), of the moving
    average's where there is one. ``results.json`` holds its figures.

    A checkpoint that cannot be written, on a full disk say, leaves the earlier ones as they are;
    the next one is tried again, and the run ends with an error only if its last one is missing.

    Args:
        interval: epochs between checkpoints; the last epoch is always written.
        keep: newest checkpoints kept.
        updates: also write one after every so many updates.
        minutes: also write one after so many minutes, by the first process's clock.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 1,
        keep: int = 2,
        updates: int | None = None,
        minutes: float | None = None,
    ) -> None:
        self.interval = interval
        self.keep = keep
        self.updates = updates
        self.minutes = minutes

    def before_train(self, runner: Any) -> None:
        self._writer = Writer()
        self._agreement = Agreement(runner.process)
        self._saved_at = time.monotonic()
        meta = runner.resumed
        if meta is not None and runner.process.is_main:
            # A run may have been killed between writing a checkpoint and naming it.
            self._name(runner, runner.resume_from, meta["metrics"], meta["is_best"], meta["epoch"])

    def after_update(self, runner: Any) -> None:
        self._report_failure(runner)
        own_clock = runner.process.is_main and self.minutes is not None
        late = own_clock and time.monotonic() - self._saved_at > 60 * (self.minutes or 0)
        save, stop = self._agreement.exchange(late, runner.signals.name is not None)
        due = save or (self.updates is not None and runner.iter % self.updates == 0)
        epoch_ends = runner.iter % runner.train_loop.updates_per_epoch == 0
        if stop or (due and not epoch_ends):
            path = self._save(runner, None, False, runner.iter)
            if stop:
                self._finish(runner)
                raise Interrupted(
                    runner.signals.name or "another process was told to end", str(path)
                )

    def after_epoch(self, runner: Any, metrics: Metrics | None) -> None:
        self._report_failure(runner)
        score = None if metrics is None else headline(metrics)[runner.task.score]
        is_best = score is not None and score > runner.best
        if is_best:
            runner.best = score
        is_due = runner.epoch % self.interval == 0 or runner.epoch == runner.max_epochs
        if is_best or is_due:
            self._save(runner, metrics, is_best, None)

    def after_train(self, runner: Any) -> None:
        self._finish(runner)
        best = (
            f"best {runner.task.score} {runner.best:.3f}" if runner.best >= 0 else "no best epoch"
        )
        written = "best.pth, last.pth, results.json, log.jsonl, tensorboard/"
        runner.logger.info(f"done, {best}; in {runner.work_dir}: {written}")

    def _save(
        self, runner: Any, metrics: Metrics | None, is_best: bool, update: int | None
    ) -> Path:
        """Begin to write a checkpoint; a collective call."""
        host_barrier("gathering a checkpoint")
        state = runner.state(metrics, is_best)
        path = Path(runner.work_dir, checkpoint_name(runner.epoch, update))
        self._saved_at = time.monotonic()
        if runner.process.is_main:
            epoch = runner.epoch
            name = lambda: self._name(runner, path, metrics, is_best, epoch)  # noqa: E731
            self._writer.write(state, path, name)
        return path

    def _name(
        self, runner: Any, path: Path, metrics: Metrics | None, is_best: bool, epoch: int
    ) -> None:
        """``last.pth``, ``best.pth`` and the results of a checkpoint that is written."""
        work_dir = Path(runner.work_dir)
        link(path, work_dir / "last.pth")
        if metrics is not None and is_best:
            link(path, work_dir / "best.pth")
            results = {
                **headline(metrics),
                "epoch": epoch,
                "checkpoint": str(work_dir / "best.pth"),
                "params": sum(p.numel() for p in runner.task.network.parameters()),
            }
            write_json(results, work_dir / "results.json")
        found = checkpoints(work_dir)
        if path in found:
            # A run that went back to an earlier epoch leaves later ones alone until it passes them.
            for old in found[: found.index(path) + 1][: -self.keep]:
                old.unlink()

    def _report_failure(self, runner: Any) -> None:
        failure = self._writer.take_failure()
        if failure is not None:
            runner.logger.error(
                f"a checkpoint could not be written ({failure}); earlier ones are as they were, "
                "and the next one will be tried"
            )

    def _finish(self, runner: Any) -> None:
        self._writer.wait()
        failure = self._writer.take_failure()
        if failure is not None:
            raise CheckpointError(
                f"the last checkpoint could not be written to {runner.work_dir}: {failure}"
            )


def write_json(content: dict[str, Any] | list[Any], path: Path) -> None:
    """Write a JSON file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
