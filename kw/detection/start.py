"""Start from a whole detector, of mmdetection or of this project.

The backbone's weights are loaded into the static network before the conversion, so that it computes
the same; neck and heads are loaded by name. Tensors whose shape depends on the number of classes
keep their fresh values if the number differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import say
from ..models.weights import CheckpointError, refuse_other
from .backbone import Backbone
from .config import without_weights
from .detector import build_detector
from .weights import StartWeights, count_parts, part_of, read_detector

_SHOWN = 20


def start_detector(model: dict[str, Any], classes: Sequence[str], load_from: str) -> Any:
    """Build a detector with the weights of another one; messages say what was loaded and what not.

    Args:
        model: settings for mmdetection's registry, as for :func:`build_detector`.
        classes: category names.
        load_from: file of a detector of the same kind. A part that only one of the two has, for
            example masks, is left out. All tensors of a common part must fit, except those whose
            shape depends on the number of classes.

    Returns:
        mmdetection's detector.

    Raises:
        ConfigError: the detector cannot be built.
        CheckpointError: the file cannot be read, or does not fit.
    """
    start = read_detector(load_from)
    settings = {**model, "backbone": without_weights(model)["backbone"]}
    if settings["backbone"].pop("resumes", False):  # a backbone of this project
        settings["backbone"]["weights"] = start
        if (replaced := model["backbone"].get("weights")) is not None:
            say(f"{start.source} has the backbone: model.backbone.weights {replaced} is not read")
    detector = build_detector(settings, classes)
    _load(detector, start, model, classes)
    return detector


def _load(
    detector: Any, start: StartWeights, model: dict[str, Any], classes: Sequence[str]
) -> None:
    """Load all weights, or none, but the backbone's, which it has loaded already."""
    has_network = isinstance(detector.backbone, Backbone)
    found = start.others if has_network else start.state
    every = detector.state_dict()
    own = {
        k: v for k, v in every.items() if not (has_network and k.startswith("backbone.network."))
    }
    shared = set(map(part_of, own)) & set(map(part_of, found))
    if not shared:
        raise CheckpointError(
            f"{start.source}: none of its parts ({count_parts(found) or 'a backbone alone'}) is "
            f"one of the detector's ({count_parts(own)})"
        )
    unused = [name for name in found if part_of(name) not in shared]
    state = {name: value for name, value in found.items() if part_of(name) in shared}
    absent = {name: value for name, value in own.items() if part_of(name) not in shared}
    other = {name for name in own if name in state and state[name].shape != own[name].shape}
    resized = other & _of_classes(own, model, classes) if other else set()
    # Old files lack the counters of batches, which have no effect.
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    kept = {name: own[name] for name in resized}
    refuse_other(own, {**counters, **state, **absent, **kept}, start.source)
    loaded = {name: value for name, value in state.items() if name not in resized}
    detector.load_state_dict({**every, **loaded})

    backbone = f"backbone {len(start.backbone)}, " if has_network else ""
    say(f"{start.source}: tensors loaded: {backbone}{count_parts(loaded)}")
    if resized or absent:
        reasons = [
            f"{name} {list(own[name].shape)} ({list(state[name].shape)} in the file)"
            for name in own
            if name in resized
        ]
        _say_names(f"{start.source}: start afresh", [*reasons, *absent])
    if unused:
        _say_names(f"{start.source}: not used", unused)
    if not resized and start.classes is not None:
        _compare_classes(start, classes)


def _of_classes(
    own: Mapping[str, Tensor], model: dict[str, Any], classes: Sequence[str]
) -> set[str]:
    """The tensors whose shape depends on the number of classes: another class changes it."""
    wider = build_detector(without_weights(model), [*classes, "one more"]).state_dict()
    return {name for name, value in own.items() if wider[name].shape != value.shape}


def _compare_classes(start: StartWeights, classes: Sequence[str]) -> None:
    """Report classes of other names in the same number: the heads then predict ours for theirs."""
    assert start.classes is not None
    pairs = list(zip(start.classes, classes, strict=False))
    differ = [f"{theirs} -> {ours}" for theirs, ours in pairs if theirs != ours]
    if len(start.classes) == len(classes) and differ:
        _say_names(f"{start.source}: as many classes of other names, heads loaded as", differ)


def _say_names(what: str, names: Iterable[str]) -> None:
    listed = list(names)
    rest = len(listed) - _SHOWN
    more = f", ... and {rest} more" if rest > 0 else ""
    say(f"{what}: {len(listed)}: {', '.join(listed[:_SHOWN])}{more}")
