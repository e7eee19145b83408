"""What a run trains, as the trainer needs to know it: a classifier, a detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Task:
    """A model with its loss, and its evaluation.

    Attributes:
        model: what is trained: a batch of the training loader -> losses by name, scalars; ``loss``
            is the one that is minimised.
        network: the part that checkpoints hold and that is averaged and evaluated.
        evaluate: ``network -> metrics`` on this process's share of the test images, reduced over
            all processes: a collective call. It evaluates at the temperature that the network
            has and leaves the network in the mode that it was in. A figure that does not exist,
            such as the precision on large objects of a set that has none, is ``None``.
        score: the metric by which epochs are compared, larger is better.
        classes: their names, which checkpoints carry.
        config_name: file of the work directory that holds the resolved configuration.
        config_text: its content, which checkpoints carry as well.
    """

    model: nn.Module
    network: nn.Module
    evaluate: Callable[[nn.Module], dict[str, float | None]]
    score: str
    classes: list[str]
    config_name: str
    config_text: str


def headline(metrics: Metrics) -> dict[str, Any]:
    """The figures that stand for a run: the moving average's where there is one, else the model's.

    Args:
        metrics: of the model, and with the prefix ``ema_`` those of its average.

    Returns:
        The figures without prefix, ``weights`` (``"ema"`` or ``"model"``), and beside an average
        the model's own figures with the prefix ``model_``.
    """
    own = {name: value for name, value in metrics.items() if not name.startswith("ema_")}
    average = {
        name.removeprefix("ema_"): value for name, value in metrics.items() if name not in own
    }
    if not average:
        return {**own, "weights": "model"}
    return {**average, "weights": "ema", **{f"model_{name}": v for name, v in own.items()}}
