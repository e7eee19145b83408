"""When checkpoints are written, which are kept, and the run's results."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from ...registry import HOOKS
from ..task import Metrics, headline

__all__ = ["CheckpointHook", "latest_checkpoint"]


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Writes ``epoch_N.pth`` every few epochs and keeps the newest, ``last.pth`` and ``best.pth``.

    The best epoch is that of the highest score (:attr:`kw.engine.task.Task.score`), of the moving
    average's where there is one.
    ``results.json`` holds its figures.

    Args:
        interval: epochs between checkpoints; the last epoch is always written.
        keep: newest ``epoch_N.pth`` kept.
    """

    priority = "VERY_LOW"

    def __init__(self, interval: int = 1, keep: int = 2) -> None:
        self.interval = interval
        self.keep = keep

    def after_epoch(self, runner: Any, metrics: Metrics | None) -> None:
        work_dir = Path(runner.work_dir)
        score = None if metrics is None else headline(metrics)[runner.task.score]
        is_best = score is not None and score > runner.best
        if is_best:
            runner.best = score
        is_due = runner.epoch % self.interval == 0 or runner.epoch == runner.max_epochs
        if not (is_best or is_due):
            return
        path = work_dir / f"epoch_{runner.epoch}.pth"
        runner.save(path, metrics)
        if not runner.process.is_main:
            return
        _link(path, work_dir / "last.pth")
        if metrics is not None and is_best:
            _link(path, work_dir / "best.pth")
            results = {
                **headline(metrics),
                "epoch": runner.epoch,
                "checkpoint": str(work_dir / "best.pth"),
                "params": sum(p.numel() for p in runner.task.network.parameters()),
            }
            write_json(results, work_dir / "results.json")
        # A run that went back to an earlier epoch leaves later ones alone until it passes them.
        written = [p for n, p in _epoch_checkpoints(work_dir).items() if n <= runner.epoch]
        for old in written[: -self.keep]:
            old.unlink()


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The newest ``epoch_N.pth`` of a work directory."""
    return next(reversed(_epoch_checkpoints(work_dir).values()), None)


def write_json(content: dict[str, Any] | list[Any], path: Path) -> None:
    """Write a JSON file whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def _epoch_checkpoints(work_dir: Path) -> dict[int, Path]:
    """``epoch_N.pth`` by N, oldest first."""
    numbered = {}
    for path in work_dir.glob("epoch_*.pth"):
        if match := re.fullmatch(r"epoch_(\d+)\.pth", path.name):
            numbered[int(match[1])] = path
    return dict(sorted(numbered.items()))


def _link(source: Path, target: Path) -> None:
    """A second name for a file, where the file system has them; else a copy. Replaces at once."""
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
