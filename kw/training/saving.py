"""The checkpoints of a work directory: written in a thread, named, found, and old ones deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import CheckpointError, find_damage, replacing, save_checkpoint
from .logs import logger

_PLAIN = (bool, int, float, str, bytes, set, type(None), torch.dtype, torch.device)
_NAME = re.compile(r"epoch_(\d+)(?:_update_(\d+))?\.pth")


def checkpoint_name(epoch: int, update: int | None) -> str:
    """File name of a checkpoint: ``epoch_3.pth`` after the third epoch and its evaluation, or
    ``epoch_3_update_4100.pth`` within the next, after so many updates of the whole run."""
    return f"epoch_{epoch}.pth" if update is None else f"epoch_{epoch}_update_{update}.pth"


def checkpoints(work_dir: Path) -> list[Path]:
    """The checkpoints of a work directory, in the order of training."""
    found = [
        (int(match[1]), int(match[2] or -1), path)
        for path in work_dir.glob("epoch_*.pth")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def remaining(work_dir: Path) -> list[Path]:
    """:func:`checkpoints`; where those were deleted, ``best.pth`` and ``last.pth``."""
    links = [work_dir / "best.pth", work_dir / "last.pth"]
    return checkpoints(work_dir) or [path for path in links if path.is_file()]


def newest_whole(work_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums agree; ``report`` gets a line on each newer one."""
    for path in reversed(remaining(work_dir)):
        fault = find_damage(path, ours=True)
        if fault is None:
            return path
        report(f"skipped {path}: {fault}")
    return None


def copied(state: Any, name: str = "state") -> Any:
    """A state with all tensors copied to host memory, which training does not write to, and NumPy's
    numbers as Python's, which can be read without running code.

    Raises:
        CheckpointError: it holds something else than tensors and plain types; ``name`` is what the
            message calls the state.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, Mapping):
        return {key: copied(value, f"{name}[{key!r}]") for key, value in state.items()}
    if isinstance(state, (list, tuple)):  # generators take the tuples alone that they gave
        values = (copied(value, f"{name}[{place}]") for place, value in enumerate(state))
        return tuple(values) if isinstance(state, tuple) else list(values)
    if type(state) not in _PLAIN:
        raise CheckpointError(
            f"{name} is of type {type(state).__name__}, which no checkpoint can hold: expected "
            "tensors, numbers, text, lists and mappings"
        )
    return state


def link(source: Path, target: Path) -> None:
    """A hard link to a file, or a copy where the file system has none; replaces atomically."""
    with replacing(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


class Checkpoints:
    """Writes a run's checkpoints in a thread; keeps the newest, ``last.pth`` and ``best.pth``.

    If a checkpoint cannot be written, for example on a full disk, earlier ones are kept and the
    next one is tried. The run ends with an error only if its last checkpoint cannot be written.
    """

    def __init__(self, work_dir: Path, keep: int) -> None:
        self.work_dir = work_dir
        self.keep = keep
        self._failure: Exception | None = None  # of the last write
        self._thread: threading.Thread | None = None

    def wait(self) -> None:
        """Wait for the last checkpoint, written or not."""
        if self._thread is not None:
            self._thread.join()

    def write(
        self, state: Mapping[str, Any], path: Path, best: Mapping[str, Any] | None = None
    ) -> None:
        """Copy a state of tensors and plain types, and write it in a thread; waits for the previous
        write. ``best``: the run's results, if this is its best checkpoint so far."""
        self.wait()
        copy = copied(state)

        def work() -> None:
            try:
                save_checkpoint(copy, path)
                self.name(path, best)
            except Exception as error:  # nobody else would hear of it
                self._failure = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=False)
        self._thread.start()

    def name(self, path: Path, best: Mapping[str, Any] | None) -> None:
        """``last.pth``, ``best.pth`` and ``results.json`` of a checkpoint that is written."""
        link(path, self.work_dir / "last.pth")
        if best is not None:
            link(path, self.work_dir / "best.pth")
            results = {**best, "checkpoint": str(self.work_dir / "best.pth")}
            write_json(results, self.work_dir / "results.json")
        found = checkpoints(self.work_dir)
        if path in found:
            # A run that went back to an earlier epoch leaves later ones alone until it passes them.
            for old in found[: found.index(path) + 1][: -self.keep]:
                old.unlink()

    def report_failure(self) -> None:
        """Log the error of the last write, if there was one."""
        if self._failure is not None:
            logger.error(
                f"a checkpoint could not be written ({self._failure}); earlier ones are "
                "kept, and the next one will be tried"
            )
            self._failure = None

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written.
        """
        self.wait()
        if self._failure is not None:
            raise CheckpointError(
                f"the last checkpoint could not be written to {self.work_dir}: {self._failure}"
            )


def write_json(content: dict[str, Any] | list[Any], path: Path) -> None:
    """Write a JSON file atomically; a number that is not finite, which is no JSON, as null."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
        text = json.dumps(finite, indent=2)
    with replacing(path) as partial:
        partial.write_text(text + "\n")
