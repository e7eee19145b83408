"""What the selector chooses for every layer of a network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .layers import KWLayer
from .ops import YARDSTICKS, Problem, selector
from .ops.device import DeviceProfile
from .ops.selection import Prediction
from .probe import arguments


@dataclass(frozen=True)
class LayerChoice:
    """One layer's back ends for one input.

    Attributes:
        layer: its name in the model.
        problem: its shapes, types and device; ``None`` for a yardstick, which the selector never
            chooses, and for a layer that computes without back ends.
        forward: back end of the forward pass; ``"none"`` for a layer without.
        backward: back end of the backward pass.
        forward_costs: predictions for the forward pass, fastest first.
        backward_costs: the same for the backward pass.
    """

    layer: str
    problem: Problem | None
    forward: str
    backward: str
    forward_costs: tuple[Prediction, ...] = ()
    backward_costs: tuple[Prediction, ...] = ()


def explain(model: nn.Module, example_input: Any) -> list[LayerChoice]:
    """The back end of every layer for an input like the given one.

    The model is run once without gradients, in its present mode, on its device, under the current
    autocast. Layers are listed in the order in which they run.

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
    args, kwargs = arguments(example_input)
    with selector.recording() as recorded:

        def note(layer: nn.Module, _inputs: Any, _output: Any) -> None:
            assert isinstance(layer, KWLayer)
            if recorded:
                choices.append(_choice(names[layer], *recorded[-1], layer.backend))
                recorded.clear()  # of the backward pass, too
            else:
                only = layer.backend if layer.backend in YARDSTICKS else "none"
                choices.append(LayerChoice(names[layer], None, only, only))

        hooks = [layer.register_forward_hook(note) for layer in names]
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return choices


def explain_on(
    choice: LayerChoice, batch: int, dtype: torch.dtype, profile: DeviceProfile
) -> LayerChoice:
    """The back ends for a layer of :func:`explain` on another GPU, from its profile.

    Args:
        choice: from :func:`explain`; a yardstick is returned unchanged.
        batch: samples.
        dtype: type of inputs and cells on the GPU.
        profile: of the GPU, e.g. that of one of :data:`kw.warehouse.ops.gpus.GPUS`.
    """
    if choice.problem is None:
        return choice
    problem = replace(choice.problem, batch=batch, dtype=dtype, device="cuda", cells_dtype=None)
    forward, backward = (
        selector.predict(replace(problem, training=training), profile) for training in (False, True)
    )
    costs = (tuple(forward), tuple(backward))
    return LayerChoice(choice.layer, problem, forward[0].name, backward[0].name, *costs)


def _choice(name: str, problem: Problem, forward: str, backend: str) -> LayerChoice:
    training = replace(problem, training=True)
    return LayerChoice(
        name,
        problem,
        forward,
        selector.choose(training, backend).name,
        tuple(selector.predict(problem)),
        tuple(selector.predict(training)),
    )
