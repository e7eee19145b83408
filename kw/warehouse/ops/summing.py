"""One buffer for the gradients that the users of a warehouse's cells give in a backward pass.

A warehouse may hold four times the parameters of its layers; autograd would take a gradient of that
size from each of them, all in fresh memory, and add them up. Here the layers add to one buffer:

    cells --------------------------------> layer's node      (an undefined gradient goes back)
      `--> _Sum --anchor (no values)------> layer's node      (likewise)

``_Sum`` stands between the cells and their users. The engine runs it when all users that this
backward pass reaches have run, and never earlier; it hands on the buffer that they have filled. No
tensor in the engine's hands is ever written to, so that it does not matter what else it adds to the
gradient: hooks, other back ends, other uses of the cells.

- A buffer belongs to one backward pass, by the engine's number for it: partial gradients, repeated
  passes and passes in several threads or inside one another do not meet.
- Where the engine will not run ``_Sum`` (the cells' gradient is not asked for), a layer returns its
  gradient as any other function does.
- The anchor is kept by the nodes of the layers alone, and goes with the last of them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_private import backward_pass, in_function_transform, runs_in_this_pass

__all__ = ["GradientSum", "anchor_of", "forget_anchor", "sum_of"]

_anchors: dict[int, weakref.ref[Tensor]] = {}


class GradientSum:
    """A sum of gradients in the making.

    Attributes:
        value: of the cells' shape; ``None`` before the first summand.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = {}  # by backward pass
        ctx.key = id(cells)
        return cells.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        # A loss that lives on keeps this node; the next forward pass needs a younger one, or its
        # cells' gradients would come last of all.
        _anchors.pop(ctx.key, None)
        total = ctx.sums.pop(backward_pass(), None)
        return None if total is None else total.value


def anchor_of(cells: Tensor) -> Tensor | None:
    """What ties users of the cells to their common node: an input without values, ``[0]``.

    The same for all graphs that are alive. ``None`` where gradients are not summed here: of tensors
    that autograd does not keep a gradient for, off the CPU, or under a function transform.
    """
    if (
        type(cells) is not nn.Parameter
        or not (cells.requires_grad and cells.is_cpu and cells.is_contiguous())
        or in_function_transform()
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

    Autograd runs nodes that are ready in the reverse order of their making. Whoever waits for the
    cells' gradient with a node of his own, made now, is run after all that is made from now on.
    """
    _anchors.pop(id(cells), None)


def _belongs(anchor: Tensor, cells: Tensor) -> bool:
    """Whether it leads to where autograd now accumulates the cells' gradient.

    Numbers of dead objects are given again, and a parameter that moves to another type has another
    accumulator afterwards.
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
    return node.sums.setdefault(task, GradientSum())
