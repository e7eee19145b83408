"""One process's step: its parts, and when every parameter's gradient comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ...warehouse import KWLayer
from ..cases import NetworkSource
from ..conditions import Conditions
from ..steps import TrainingStep, build_step
from ..timing import WARM_UP
from .buckets import Gradient
from .model import Step

__all__ = ["StepProfile", "backend_of", "profile_step"]


@dataclass(frozen=True)
class StepProfile:
    """A measured step.

    Attributes:
        step: medians over the rounds.
        gradients: as their parameters are registered.
    """

    step: Step
    gradients: list[Gradient]


def backend_of(source: NetworkSource) -> str:
    """What :meth:`NetworkSource.build` calls the network as it is configured."""
    model = source.config.model
    return "static" if model.kernel_warehouse is None and model.peer is None else "auto"


def profile_step(source: NetworkSource, conditions: Conditions) -> StepProfile:
    """Time a network's training steps, parameter by parameter; the mode has to be ``"train"``.

    Gradients are complete when they are accumulated
    (``Tensor.register_post_accumulate_grad_hook``): of cells that several layers share, after the
    first of these layers. On a GPU times are those of its own clock.
    """
    step = build_step(source, backend_of(source), conditions)
    assert isinstance(step, TrainingStep)
    clock = _Clock(step.inputs.is_cuda)
    names = {p: name for name, p in step.network.named_parameters() if p.requires_grad}
    for _ in range(WARM_UP):
        _run(step, clock)
    ready: dict[nn.Parameter, Any] = {}
    used: dict[nn.Parameter, Any] = {}

    def note_gradient(parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        ready[parameter] = clock.now()

    def note_use(layer: nn.Module, _: Any) -> None:
        assert isinstance(layer, KWLayer)
        used.setdefault(layer.warehouse.cells, clock.now())

    hooks: list[Any] = [p.register_post_accumulate_grad_hook(note_gradient) for p in names]
    hooks += [
        module.register_forward_pre_hook(note_use)
        for module in step.network.modules()
        if isinstance(module, KWLayer)
    ]
    shares: dict[nn.Parameter, list[float]] = {p: [] for p in names}
    uses: dict[nn.Parameter, list[float]] = {p: [] for p in names}
    parts: list[tuple[float, float, float]] = []
    for _ in range(conditions.rounds):
        used.clear()
        start, middle, end, done = _run(step, clock)
        forward, backward = clock.between(start, middle), clock.between(middle, end)
        parts.append((forward, backward, clock.between(end, done)))
        for parameter, mark in ready.items():
            shares[parameter].append(min(clock.between(middle, mark) / backward, 1.0))
        for parameter, mark in used.items():
            uses[parameter].append(clock.between(start, mark) / forward)
    for hook in hooks:
        hook.remove()
    gradients = [
        Gradient(
            name,
            p.numel() * p.element_size(),
            round(median(shares[p]), 6),
            round(median(uses[p]), 6) if uses[p] else None,
        )
        for p, name in names.items()
    ]
    medians = [median(values) for values in zip(*parts, strict=True)]
    return StepProfile(Step(conditions.batch_size, *medians), gradients)


def _run(step: TrainingStep, clock: _Clock) -> tuple[Any, ...]:
    """A step, and the times at its begin and after each of its parts."""
    marks = [clock.now()]

    def run(part: Callable[[], Any]) -> Any:
        found = part()
        marks.append(clock.now())
        return found

    loss = run(step.forward)
    run(lambda: step.backward(loss))
    run(step.update)
    step.clear()
    clock.wait()
    return tuple(marks)


class _Clock:
    """The device's: events of a GPU, which are read when it is done, or seconds."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.on_gpu else end - start

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
