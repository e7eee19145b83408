"""Settings of runs: read, compared, written as options."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError, load_config, to_dict, to_yaml
from ..config.tree import flat_settings, show

# The machine's concern, or that of the log; prefixes of dotted keys.
_NEUTRAL = (
    "data.root",
    "data.workers",
    "data.check",
    "log_interval",
    "loggers",
    "pictures",
    "distributed.timeout_minutes",
    "checkpoint.",
    "eval_batch_size",
    "compile",
    "channels_last",
    "contraction.backend",
    "contraction.planner",
)
_WEIGHTS = ("model.weights", "model.backbone.weights")
_ABSENT = object()


def read_settings(path: Path, options: Iterable[str] = ()) -> dict[str, Any]:
    """A configuration as nested mappings, every setting in it.

    Raises:
        ConfigError: it is wrong, or a detector's and mmdetection is missing.
    """
    config = _load(path, options)
    if path.suffix != ".py":
        return to_dict(config)
    parts = {name: getattr(config, name) for name in ("model", "train_pipeline", "test_pipeline")}
    return {**dataclasses.asdict(config.run), **parts}


def resolved_text(path: Path, options: Iterable[str] = ()) -> str:
    """A configuration as the text of a file that needs no other, every setting in it.

    Raises:
        ConfigError: as :func:`read_settings`.
    """
    config = _load(path, options)
    return to_yaml(config) if path.suffix != ".py" else str(config.to_python())


def _load(path: Path, options: Iterable[str]) -> Any:
    with warnings.catch_warnings():
        # An option of all rows may have no effect on this one.
        warnings.simplefilter("ignore", UserWarning)
        if path.suffix != ".py":
            return load_config(path, options, check_model_name=False)
        try:
            from ..detection import load_detector_config
        except ImportError as error:
            raise ConfigError(f"{path}: a detector's configuration: {error}") from error
        return load_detector_config(path, options)


def as_option(key: str, value: Any) -> str:
    """A setting as ``--cfg-options`` takes it."""
    return f"{key}={json.dumps(value)}"  # YAML's flow style contains JSON


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, seed: bool = True
) -> list[str]:
    """The settings that may change a run's result and differ, as ``key old -> new``.

    Args:
        one: a configuration as nested mappings.
        other: likewise.
        seed: compare the seeds as well.
    """
    # An empty mapping says no more than one that is not there.
    sides = [{k: v for k, v in flat_settings(side).items() if v != {}} for side in (one, other)]
    found = []
    for key in dict.fromkeys((*sides[0], *sides[1])):
        old, new = (_plain(side.get(key, _ABSENT)) for side in sides)
        is_moved = key in _WEIGHTS and _kind(old) == _kind(new)
        is_neutral = key.startswith(_NEUTRAL) or is_moved or (key == "seed" and not seed)
        if old != new and not is_neutral:
            found.append(f"{key} {_shown(old)} -> {_shown(new)}")
    return found


def _kind(weights: Any) -> Any:
    """What weights are by another name too: nothing, a file; else a name of timm or the hub."""
    if weights in (None, _ABSENT):
        return None
    return weights if str(weights).partition(":")[0] in ("timm", "hf-hub") else "file"


def _plain(value: Any) -> Any:
    """Tuples as lists: a resolved configuration may have lost the difference."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return f"{len(value)} steps"
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return f"[{', '.join(map(_shown, value))}]"
    return show(value)
