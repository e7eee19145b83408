"""Checks of a checkpoint's content before it is used.

A file of tensors and plain types runs no code, but it may come from another program or another run,
or be edited. The checks return a fault as part of a sentence, or None.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import ConfigError
from ..config.loading import parse_config
from ..config.tree import flat_settings
from ..warehouse.warehouse import earlier_order, names_now


def layout_fault(checkpoint: Mapping[Any, Any]) -> str | None:
    """A fault of the parts that every reader uses; parts may be missing."""
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
    for key in ("epoch", "iter", "updates_per_epoch"):
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


def resume_fault(checkpoint: Mapping[str, Any], optimizer: Optimizer) -> str | None:
    """Why a run with this optimizer cannot resume from a checkpoint of valid layout.

    Weights are not checked here, and a checkpoint that holds nothing else is accepted.
    """
    if "optimizer" not in checkpoint:
        return None
    meta = checkpoint.get("meta", {})
    missing = [key for key in ("epoch", "iter", "best") if meta.get(key) is None]
    if missing:
        return f"it lacks {', '.join(f'meta.{key}' for key in missing)}"
    state = checkpoint["optimizer"]
    inner = state.get("optimizer") if isinstance(state, Mapping) else None
    if not isinstance(inner, Mapping):
        return "its optimizer is not laid out as this version writes it"
    return _optimizer_fault(inner, optimizer)


def settings_changed(before: Any, now: str) -> list[str]:
    """The differences between two resolved configurations, one line per setting; ``before`` is a
    checkpoint's, which may be of any type."""
    if not isinstance(before, str):
        return []
    try:
        old, new = (flat_settings(parse_config(text, "").plain()) for text in (before, now))
    except ConfigError:  # a detector's, which is Python
        lines = difflib.ndiff(before.splitlines(), now.splitlines())
        return [line for line in lines if line[:2] in ("- ", "+ ")]
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]


def number_as_now(checkpoint: Mapping[str, Any], network: nn.Module, optimizer: Optimizer) -> None:
    """Renumber an earlier version's optimizer state in this version's order of parameters.

    Checkpoints of this version, and those that :func:`resume_fault` refuses, are not changed.
    """
    if not any(name in checkpoint["state_dict"] for name in names_now(network)):
        return
    place = {id(parameter): i for i, parameter in enumerate(earlier_order(network))}
    try:
        groups = checkpoint["optimizer"]["optimizer"]["param_groups"]
        for own, theirs in zip(optimizer.param_groups, groups, strict=True):
            before = sorted(own["params"], key=lambda parameter: place[id(parameter)])
            number = dict(zip(map(id, before), theirs["params"], strict=True))
            theirs["params"] = [number[id(parameter)] for parameter in own["params"]]
    except (KeyError, TypeError, ValueError):
        return


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
        return (
            "its optimizer has other groups of parameters (optimizer.exempt_from_decay, "
            "attention_lr, head_lr or layer_decay, or model.freeze?)"
        )
    for theirs, ours in zip(groups, own, strict=True):
        kinds = [{"betas", "momentum"} & set(group) for group in (theirs, ours)]
        # "algo": Muon and AdaMuon.
        if kinds[0] != kinds[1] or theirs.get("algo") != ours.get("algo"):
            return "its optimizer is another one (optimizer.name)"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Other optimizers keep rows and columns, or a few values alone.
    like_parameters = isinstance(optimizer, (torch.optim.AdamW, torch.optim.SGD))
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        entry = values.get(number, {})
        if not isinstance(entry, Mapping):
            return f"its optimizer's state of parameter {number} is {_kind(entry)}"
        for name, value in entry.items():
            if not isinstance(value, Tensor) or not like_parameters:
                continue
            if value.ndim and value.shape != parameter.shape:
                return (
                    f"its optimizer's {name} of parameter {number} is {list(value.shape)}, the "
                    f"parameter is {list(parameter.shape)}"
                )
    return None


def _kind(value: Any) -> str:
    return "an empty mapping" if isinstance(value, Mapping) and not value else type(value).__name__
