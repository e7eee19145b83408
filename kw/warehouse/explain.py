"""What the planner chooses for every layer of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .layers import KWLayer
from .ops import YARDSTICKS, Problem, planner
from .ops.planner import Prediction

__all__ = ["LayerChoice", "explain"]


@dataclass(frozen=True)
class LayerChoice:
    """One layer's back ends for one input.

    Attributes:
        layer: its name in the model.
        problem: its shapes, types and device; ``None`` for a yardstick, which is not planned.
        forward: back end of the forward pass.
        backward: back end of the backward pass.
        forward_costs: predictions for the forward pass, quickest first.
        backward_costs: the same for the backward pass.
    """

    layer: str
    problem: Problem | None
    forward: str
    backward: str
    forward_costs: tuple[Prediction, ...] = ()
    backward_costs: tuple[Prediction, ...] = ()


def explain(model: nn.Module, example_input: Any) -> list[LayerChoice]:
    """The back end of every layer when the model is given such an input.

    The model is run once without gradients, as it stands: its mode, its device, the autocast that
    is on. Layers come in the order in which they run.

    Args:
        model: a network with KernelWarehouse layers, not compiled.
        example_input: a tensor, or a tuple or mapping of arguments.

    Raises:
        ValueError: there are no KernelWarehouse layers.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not names:
        raise ValueError(f"{type(model).__name__} has no KernelWarehouse layer")
    choices: list[LayerChoice] = []
    with planner.recording() as recorded:

        def note(layer: nn.Module, _inputs: Any, _output: Any) -> None:
            assert isinstance(layer, KWLayer)
            if layer.backend in YARDSTICKS:
                choices.append(LayerChoice(names[layer], None, layer.backend, layer.backend))
            else:
                problem, forward = recorded[-1]
                choices.append(_choice(names[layer], problem, forward, layer.backend))

        hooks = [layer.register_forward_hook(note) for layer in names]
        try:
            with torch.no_grad():
                _call(model, example_input)
        finally:
            for hook in hooks:
                hook.remove()
    return choices


def _choice(name: str, problem: Problem, forward: str, backend: str) -> LayerChoice:
    training = replace(problem, training=True)
    return LayerChoice(
        name,
        problem,
        forward,
        planner.choose(training, backend).name,
        tuple(planner.predict(problem)),
        tuple(planner.predict(training)),
    )


def _call(model: nn.Module, example_input: Any) -> None:
    if isinstance(example_input, Mapping):
        model(**example_input)
    else:
        model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
