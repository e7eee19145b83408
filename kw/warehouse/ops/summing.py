"""One buffer per backward pass for the cells' gradients of all layers of a warehouse.

A warehouse may have four times the parameters of its layers; autograd would allocate a gradient of
that size for each layer and add them up. Here the layers add to one buffer:

    cells --------------------------------> layer's node      (an undefined gradient goes back)
      `--> _Sum --anchor (no values)------> layer's node      (likewise)

``_Sum`` is the node between the cells and the layers. Autograd runs it after all layers that this
backward pass reaches, and it returns the buffer that they have filled. Tensors that autograd holds
are never written to, so that hooks, other back ends and other uses of the cells work as usual.

- A buffer belongs to one backward pass, by the engine's number for it: partial gradients, repeated
  passes, passes in several threads and nested passes do not mix.
- Where the engine will not run ``_Sum`` (the cells' gradient is not asked for), a layer returns its
  gradient as any other autograd function.
- Only the layers' nodes hold the anchor; it is freed with the last of them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_private import backward_pass, runs_in_this_pass

_anchors: dict[int, weakref.ref[Tensor]] = {}


class GradientSum:
    """A partial sum of gradients.

    Attributes:
        dtype: the cells'.
        value: of the cells' shape; ``None`` before the first summand.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.value: Tensor | None = None
        self._stream: Any = None

    def add(self, gradient: Tensor) -> None:
        """Add a layer's gradient, which may be of another dtype and is not used afterwards."""
        self.wait()
        if self.value is None:
            self.value = gradient.to(self.dtype).contiguous()
        else:
            self.value += gradient
        if gradient.is_cuda:
            self._stream = torch.cuda.current_stream(gradient.device)

    def wait(self) -> None:
        """Let the current CUDA stream wait for the last summand, which may be of another one.

        Autograd does this for the gradients that it passes on itself.
        """
        if self._stream is not None and self.value is not None:
            current = torch.cuda.current_stream(self.value.device)
            if current != self._stream:
                current.wait_stream(self._stream)
                self.value.record_stream(current)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = {}  # by backward pass
        ctx.key, ctx.dtype = id(cells), cells.dtype
        return cells.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        # A loss that still exists keeps this node; the next forward pass needs a newer one, or its
        # cells' gradients would come last of all.
        _anchors.pop(ctx.key, None)
        total = ctx.sums.pop(backward_pass(), None)
        if total is None:
            return None
        total.wait()
        return total.value


def anchor_of(cells: Tensor) -> Tensor | None:
    """The input without values, ``[0]``, that connects layers to the common node of the cells.

    Shared by all graphs that exist. ``None`` where gradients are not summed here: of tensors
    that autograd does not keep a gradient for, or on other devices than CPUs and GPUs.
    """
    if (
        type(cells) is not nn.Parameter
        or not (cells.requires_grad and cells.is_contiguous())
        or cells.device.type not in ("cpu", "cuda")
    ):
        return None
    key = id(cells)
    known = _anchors.get(key)
    anchor = None if known is None else known()
    if anchor is None or not _belongs(anchor, cells):
        anchor = _Sum.apply(cells)
        _anchors[key] = weakref.ref(anchor, lambda gone: _forget(key, gone))
    return anchor


def forget_anchor(cells: Tensor) -> None:
    """Let the next user of the cells make a new node.

    Autograd runs ready nodes in the reverse order of their creation. A node that is created now and
    waits for the cells' gradient runs after all nodes that are created later.
    """
    _anchors.pop(id(cells), None)


def _belongs(anchor: Tensor, cells: Tensor) -> bool:
    """Whether it leads to where autograd now accumulates the cells' gradient.

    Python reuses the ids of freed objects, and a parameter has another accumulator after a change
    of its type.
    """
    assert anchor.grad_fn is not None
    return anchor.grad_fn.next_functions[0][0] is torch.autograd.graph.get_gradient_edge(cells).node


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    if _anchors.get(key) is gone:
        del _anchors[key]


def sum_of(anchor: Tensor | None) -> GradientSum | None:
    """In a backward pass: the sum that a user of the cells is to add to; ``None`` if it is to
    return its gradient instead."""
    task = backward_pass()
    if anchor is None or task == -1:
        return None
    node: Any = anchor.grad_fn
    if not runs_in_this_pass(node):
        return None
    return node.sums.setdefault(task, GradientSum(node.dtype))
