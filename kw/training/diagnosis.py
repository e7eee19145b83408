"""Find the layer where values stop being finite, in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ..torch_private import uncompiled


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
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    # Not loss.backward(), which would write the gradients of parameters.
    gradients = torch.autograd.grad(losses["loss"], list(trained.values()), allow_unused=True)
    if found := watch.forward or watch.backward:
        return [found]
    return [
        f"{name}: its gradient is not finite, every layer's input and output is"
        for name, gradient in zip(trained, gradients, strict=True)
        if gradient is not None and not _is_finite(gradient)
    ]


class _Watch:
    """What is found in one pass through a network: first of the forward, first of the backward."""

    def __init__(self, network: nn.Module) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self._last = ""
        self._took: dict[GradientEdge, str] = {}  # what to say of a tensor's gradient
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
            # Tensors' hooks refer to this object, in cycles that Python cannot free.
            self._names.clear()
            self._took.clear()

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
        # A tensor is one layer's output and others' input, through containers and layers that do
        # nothing: the last that took it is the one that sends its gradient back.
        for edge in self._followed(tensors):
            self._took[edge] = f"the backward pass of {layer}: the gradient of its input"

    def _left(self, module: nn.Module, given: Any, outputs: Any) -> None:
        tensors, layer = _floats(outputs), self._layer(module)
        if self.forward is None and not all(map(_is_finite, tensors)):
            sizes = [f"{_largest(t):.3g} ({str(t.dtype)[6:]})" for t in _floats(given)]
            of = f", of inputs up to {' and '.join(sizes)}" if sizes else ""
            self.forward = f"{layer}: its output is not finite{of}"
        self._last = layer
        for edge in self._followed(tensors):
            what = f"the backward pass after {layer}: the gradient of its output"
            self._took.setdefault(edge, what)

    def _followed(self, tensors: list[Tensor]) -> Iterator[GradientEdge]:
        """Where the tensors are in the graph; the first gradient that is not finite is noted."""
        for tensor in tensors:
            if tensor.requires_grad:
                edge = get_gradient_edge(tensor)
                if edge not in self._took:
                    tensor.register_hook(partial(self._passed, edge))
                yield edge

    def _passed(self, edge: GradientEdge, gradient: Tensor) -> None:
        if self.backward is None and not _is_finite(gradient):
            self.backward = f"{self._took[edge]} is not finite"


def _floats(values: Any) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
