"""What a checkpoint must look like before anything is done with it.

A file that holds tensors and plain types runs no code, but may still hold anything: another
program's, one that was edited, one of another run. Each function says what is wrong, as the middle
of a sentence, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["layout_fault", "resume_fault"]


def layout_fault(checkpoint: Mapping[Any, Any]) -> str | None:
    """What is wrong with the parts that every reader uses; parts may be missing."""
    for key in ("state_dict", "ema_state_dict"):
        state = checkpoint.get(key, {"": Tensor()})
        if not isinstance(state, Mapping) or not state:
            return f"{key} is {_kind(state)}: expected tensors by name"
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                return f"{key}: {name!r} is {_kind(value)}: expected tensors by name"
    meta = checkpoint.get("meta", {})
    if not isinstance(meta, Mapping):
        return f"meta is {_kind(meta)}: expected a mapping"
    for key in ("epoch", "iter"):
        value = meta.get(key)
        if value is not None and (type(value) is not int or value < 0):
            return f"meta.{key} is {value!r}: expected a count"
    best = meta.get("best", 0.0)
    if type(best) not in (int, float) or not math.isfinite(best):
        return f"meta.best is {best!r}: expected a number"
    classes = meta.get("classes")
    if classes is not None and not (
        isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
    ):
        return "meta.classes: expected a list of names"
    return None


def resume_fault(
    checkpoint: Mapping[str, Any], classes: Sequence[str], optimizer: Optimizer
) -> str | None:
    """Why a run cannot go on from a checkpoint whose layout is right; weights are not looked at.

    Args:
        checkpoint: it may hold weights alone, of which nothing is said here.
        classes: those that the run trains on.
        optimizer: the run's, fresh.
    """
    if "optimizer" not in checkpoint:
        return None
    meta = checkpoint.get("meta", {})
    missing = [key for key in ("epoch", "iter", "best") if meta.get(key) is None]
    if missing:
        return f"it lacks {', '.join(f'meta.{key}' for key in missing)}"
    written = meta.get("classes")
    if written is not None and list(written) != list(classes):
        changed = next((a for a, b in zip(written, classes, strict=False) if a != b), "")
        what = f"the first that differs is {changed!r}" if changed else f"{len(written)} of them"
        return f"it was trained on other classes ({what})"
    state = checkpoint["optimizer"]
    inner = state.get("optimizer") if isinstance(state, Mapping) else None
    if not isinstance(inner, Mapping):
        return "its optimizer is not laid out as this version writes it"
    return _optimizer_fault(inner, optimizer)


def _optimizer_fault(state: Mapping[Any, Any], optimizer: Optimizer) -> str | None:
    own = optimizer.state_dict()["param_groups"]
    groups, values = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(values, Mapping):
        return "its optimizer has no param_groups and state"
    if not all(isinstance(group, Mapping) for group in groups):
        return "its optimizer's param_groups are no mappings"
    if len(groups) != len(own) or any(
        not isinstance(theirs.get("params"), list) or len(theirs["params"]) != len(ours["params"])
        for theirs, ours in zip(groups, own, strict=False)
    ):
        return "its optimizer has other groups of parameters (optimizer.exempt_from_decay?)"
    for theirs, ours in zip(groups, own, strict=True):
        if {"betas", "momentum"} & set(theirs) != {"betas", "momentum"} & set(ours):
            return "its optimizer is another one (optimizer.name)"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        entry = values.get(number, {})
        if not isinstance(entry, Mapping):
            return f"its optimizer's state of parameter {number} is {_kind(entry)}"
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                return (
                    f"its optimizer's {name} of parameter {number} is {list(value.shape)}, the "
                    f"parameter is {list(parameter.shape)}"
                )
    return None


def _kind(value: Any) -> str:
    return "an empty mapping" if isinstance(value, Mapping) and not value else type(value).__name__
