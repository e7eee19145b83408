"""Checkpoints: tensors and plain types only, written atomically, read without running code.

A file is a zip archive whose parts carry checksums: a damaged or incomplete file is recognised
before anything is read from it.

A checkpoint is a mapping:

- ``state_dict``: the network's parameters and buffers, under the names of ``kw.build_model``;
- ``ema_state_dict``: the same of its moving average, where there is one;
- ``optimizer``, ``hooks``: what resuming needs besides;
- ``ranks``: what belongs to single processes: generators, and within an epoch the statistics of
  BatchNorm;
- ``meta``: ``epoch`` and ``iter`` done, ``updates_per_epoch``, ``config`` as text, ``classes``,
  ``best``, ``metrics``, versions.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import one_line
from ..models.weights import CheckpointError as CheckpointError
from ..models.weights import find_damage as find_damage
from ..models.weights import refuse_other, why_unread
from ..warehouse.sharded import placed_like
from ..warehouse.warehouse import with_names_now
from .layout import layout_fault


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which replaces a file if the block ends without an error, so
    that no partial file is seen."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint as a whole.

    Raises:
        OSError: it could not be written; an earlier file is kept.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of the disk, beneath one of torch's own
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    with suppress(OSError):  # so that the rename survives a power failure
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running code from it.

    Of a ``.safetensors`` file (``kw export``, ``kw push``) it has ``state_dict`` and the
    description's part of ``meta``.

    Raises:
        CheckpointError: there is no such file, it is damaged, it holds more than tensors and plain
            types, or it has no ``state_dict``.
    """
    path = Path(path)
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.pth"))) or "none"
        raise CheckpointError(f"checkpoint {path}: no such file; *.pth in {path.parent}: {found}")
    if path.suffix == ".safetensors":
        return _exported(path)
    if (fault := find_damage(path)) is not None:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {fault}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise CheckpointError(f"checkpoint {path}: cannot be read: {why_unread(error)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"checkpoint {path}: expected a mapping with 'state_dict', as kw train writes it"
        )
    if (fault := layout_fault(checkpoint)) is not None:
        raise CheckpointError(f"checkpoint {path}: {fault}, as kw train writes it")
    return checkpoint


def _exported(path: Path) -> dict[str, Any]:
    """An exported file's weights, in float32, as a checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta: dict[str, Any] = {"config": header["config"]} if "config" in header else {}
        if "classes" in header:
            meta["classes"] = json.loads(header["classes"])
        if "weights" in header:
            about = json.loads(header["weights"])
            prefix = "ema_" if about["of"] == "ema" else ""
            figures = {prefix + name: value for name, value in (about["metrics"] or {}).items()}
            meta |= {"weights": about["of"], "epoch": about["epoch"], "metrics": figures}
    except (
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {one_line(error)}") from error
    floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    checkpoint = {"state_dict": floats, "meta": meta}
    if (fault := layout_fault(checkpoint)) is not None:
        raise CheckpointError(f"checkpoint {path}: {fault}, as kw export writes it")
    return checkpoint


def load_network(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a network's state, of this or an earlier version, completely or with an error.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; all are listed.
    """
    own, state = network.state_dict(), with_names_now(network, state)
    refuse_other(own, state, source)
    network.load_state_dict({key: placed_like(state[key], value) for key, value in own.items()})


def named_classes(checkpoint: Mapping[str, Any], count: int, source: str) -> list[str] | None:
    """The names of a checkpoint's classes; ``None`` where it has none.

    Raises:
        CheckpointError: there are not ``count`` of them, as the network has.
    """
    names = checkpoint.get("meta", {}).get("classes")
    if names is not None and len(names) != count:
        raise CheckpointError(
            f"checkpoint {source}: names {len(names)} classes, the network has {count} "
            "(model.num_classes)"
        )
    return None if names is None else list(names)


def refuse_other_classes(
    checkpoint: Mapping[str, Any], classes: Sequence[str], source: str, data: str
) -> None:
    """A CheckpointError if the data have another list of classes: a label is an index into it.

    A checkpoint without names (``meta.classes``) is accepted. ``source`` and ``data`` are what
    messages call the two.
    """
    trained = checkpoint.get("meta", {}).get("classes")
    if trained is None or list(trained) == list(classes):
        return
    pairs = zip_longest(trained, classes, fillvalue="no class")
    place, (theirs, ours) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    raise CheckpointError(
        f"{source} was trained on other classes than those of {data}: class {place} is {theirs!r} "
        f"there and {ours!r} here ({len(trained)} and {len(classes)} classes); a label is an "
        "index into that list: name folders or categories as in training"
    )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's generators, as tensors and plain types."""
    words: Any
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss_next],
        "numpy": [torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore :func:`rng_state`."""
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
