"""Find the layer where values stop being finite, in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..torch_private import uncompiled

__all__ = ["find_origin"]

_Seen = tuple[str, str, tuple[int, int]]  # "input" or "output", of which layer, which tensor


def find_origin(
    model: Any,
    network: nn.Module,
    batches: Iterable[Any],
    context: Callable[[], AbstractContextManager[Any]],
) -> str | None:
    """Name the layer where values that are not finite come up first.

    Every layer is watched: its inputs and outputs in the order of the forward pass, then the
    gradients in the order of the backward pass. The model is left as it was, apart from the random
    numbers that it drew; what random choices decide (drop path) may differ from the update's.

    Args:
        model: batch -> losses by name (:attr:`kw.training.task.Task.model`), without DDP's wrapper.
        network: the part whose layers are named.
        batches: micro-batches of an update, as the loader gives them.
        context: makes the forward pass's autocast.

    Returns:
        Part of a sentence about the first of the batches that is not finite; ``None`` if all are.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not _is_finite(tensor.detach()):
            return f"the weights: {name} is not finite"
    kept = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    found: list[str] = []
    try:
        for batch in batches:
            # Every batch, also after a finding: layers may communicate with other processes.
            watch = _Watch(network)
            with uncompiled(network), watch.hooked():
                found += _pass(model, network, batch, context, watch)
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])
    return found[0] if found else None


def _pass(
    model: Any,
    network: nn.Module,
    batch: Any,
    context: Callable[[], AbstractContextManager[Any]],
    watch: _Watch,
) -> list[str]:
    with context():
        losses = model(batch)
    if watch.forward is None:
        bad = [name for name, value in losses.items() if not _is_finite(value.detach())]
        if bad:
            named = [name for name in bad if name != "loss"] or bad
            watch.forward = f"{', '.join(named)}: every layer's output is finite"
    named_parameters = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    # Not loss.backward(), which would write the gradients of parameters.
    gradients = torch.autograd.grad(
        losses["loss"], [p for _, p in named_parameters], allow_unused=True
    )
    if watch.forward is not None:
        return [watch.forward]
    if watch.gradients:
        return [watch.first_gradient()]
    for (name, _), gradient in zip(named_parameters, gradients, strict=True):
        if gradient is not None and not _is_finite(gradient):
            return [f"{name}: its gradient is not finite, every layer's input and output is"]
    return []


class _Watch:
    """Observations of one pass through a network."""

    def __init__(self, network: nn.Module) -> None:
        self.forward: str | None = None
        self.gradients: list[_Seen] = []  # in time's order
        self._last = ""
        self._alive: list[Tensor] = []  # so that no other tensor gets its identity
        self._names = {module: name for name, module in network.named_modules()}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch every layer inside the context."""
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._entered, with_kwargs=True))
            handles.append(module.register_forward_hook(self._left))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            # Their hooks refer to this object, in cycles that Python cannot free.
            self._alive.clear()
            self._names.clear()

    def _layer(self, module: nn.Module) -> str:
        name, kind = self._names[module], type(module).__name__
        return f"{name} ({kind})" if name else kind

    def _entered(self, module: nn.Module, given: Any, more: Any) -> None:
        tensors, layer = _floats((given, more)), self._layer(module)
        if self.forward is None and not all(map(_is_finite, tensors)):
            self.forward = (
                f"what is computed between {self._last or 'the images'} and {layer}: the "
                f"input of {layer} is not finite"
            )
            if not self._names[module]:  # the whole network
                self.forward = "the images: they are not finite after preprocessing"
        self._follow("input", layer, tensors)

    def _left(self, module: nn.Module, given: Any, outputs: Any) -> None:
        tensors, layer = _floats(outputs), self._layer(module)
        if self.forward is None and not all(map(_is_finite, tensors)):
            sizes = [f"{_largest(t):.3g} ({str(t.dtype)[6:]})" for t in _floats(given)]
            of = f", of inputs up to {' and '.join(sizes)}" if sizes else ""
            self.forward = f"{layer}: its output is not finite{of}"
        self._last = layer
        self._follow("output", layer, tensors)

    def first_gradient(self) -> str:
        """The layer in which the backward pass first gives values that are not finite."""
        place, layer, tensor = self.gradients[0]
        # A tensor is one layer's output and others' input, through containers and layers that do
        # nothing: the last that took it is the one that sent its gradient back.
        for other, name, same in self.gradients:
            if other == "input" and same == tensor:
                place, layer = other, name
        if place == "input":
            return f"the backward pass of {layer}: the gradient of its input is not finite"
        return f"the backward pass after {layer}: the gradient of its output is not finite"

    def _follow(self, place: str, layer: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.requires_grad:
                self._alive.append(tensor)
                # An activation in place gives the object that it took, at another version.
                seen = (place, layer, (id(tensor), tensor._version))
                tensor.register_hook(lambda gradient, seen=seen: self._passed(gradient, seen))

    def _passed(self, gradient: Tensor, seen: _Seen) -> None:
        if not _is_finite(gradient):
            self.gradients.append(seen)


def _floats(values: Any) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
