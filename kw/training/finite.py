"""Updates whose loss or gradient is not finite: skipped on the device, counted there.

The host does not read the decision. All processes decide alike, because they use the reduced
gradient: a loss that is not finite on one of them makes the gradient NaN on all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..errors import UserError
from ..torch_private import copy_all, overflow, step_unless


class NonFiniteError(UserError):
    """A run was stopped because too many updates were not finite."""


class Skipped(NamedTuple):
    """How many updates were skipped."""

    total: int
    in_a_row: int
    """up to the last update"""
    in_epoch: int


class FiniteGuard:
    """Makes an update without effect if its loss or gradient is not finite.

    Parameters and the optimizer's state stay as they are, bit by bit; so do the model's buffers,
    into which the forward pass has by then written NaN (BatchNorm's running statistics).

    With loss scaling (fp16) a gradient beyond the type's range is normal: the scaler skips the
    update and scales less, and that is no fault. It is one if the loss itself is not finite, or if
    the scale has fallen below 1.
    """

    def __init__(self) -> None:
        self._counts = torch.tensor(Skipped(0, 0, 0))  # int64; on the device after an update
        self._groups: list[list[Tensor]] | None = None  # buffers of one type and device
        self._kept: list[Tensor] = []
        self._loss_is_bad: Tensor | None = None
        self._is_primed = False

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Before an update's first forward pass: remember the model's buffers."""
        if self._groups is None:
            self._groups = _buffers(model)
        self._kept = [torch.cat([b.reshape(-1) for b in group]) for group in self._groups]
        self._loss_is_bad = None

    def marked(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch, with a gradient of NaN where it is not finite.

        A loss may be infinite and have a finite gradient, and other processes see the gradient
        alone. A finite loss is not changed, nor is its gradient: it is multiplied by 1.
        """
        is_finite = torch.isfinite(loss.detach())
        bad = ~is_finite
        self._loss_is_bad = bad if self._loss_is_bad is None else self._loss_is_bad | bad
        return loss * torch.where(is_finite, 1.0, float("nan"))

    @torch.no_grad()
    def step(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        norm: Tensor | None,
    ) -> None:
        """Update, or do nothing: as the gradient's global norm says or, without it, the scaler.
        Gradients are reduced and unscaled."""
        self._prime(optimizer)
        if norm is None:
            fault = self._fault_of(optimizer, scaler)
            scaler.step(optimizer)
        else:
            fault = ~torch.isfinite(norm)
            step_unless(fault, optimizer)
        self._restore(fault)
        self._counts = self._counts.to(fault.device) + fault.long()
        self._counts[1] *= fault

    def begin_epoch(self) -> None:
        """Count the epoch's updates anew."""
        self._counts[2] = 0

    def read(self) -> Skipped:
        """The counts, the same on all processes: waits for the device."""
        return Skipped(*self._counts.tolist())

    def state_dict(self) -> dict[str, int]:
        """The counts, plain numbers."""
        return self.read()._asdict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self._counts = torch.tensor(Skipped(**state))

    def _fault_of(self, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> Tensor:
        """Whether an update under loss scaling is at fault."""
        assert self._loss_is_bad is not None
        bad = self._loss_is_bad.float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            # The reduced gradient looks the same after a bad loss and after an overflow.
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        overflowed, scale = overflow(scaler, optimizer)
        return (bad > 0) | (overflowed & (scale < 1))

    def _prime(self, optimizer: Optimizer) -> None:
        """Start the momenta of SGD at zero, where they are made but left as they are found.

        torch's fused SGD allocates them in its first step, and does not write them if it skips that
        step.
        """
        if self._is_primed:
            return
        self._is_primed = True
        if not isinstance(optimizer, SGD):
            return
        for group in optimizer.param_groups:
            if group["momentum"] and group["fused"] and not group["dampening"]:
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    if parameter.grad is not None and state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter.grad)

    def _restore(self, fault: Tensor) -> None:
        for group, kept in zip(self._groups or [], self._kept, strict=True):
            now = torch.cat([b.reshape(-1) for b in group])
            parts = torch.where(fault.to(now.device), kept, now).split([b.numel() for b in group])
            copy_all(group, [part.view_as(b) for part, b in zip(parts, group, strict=True)])


def _buffers(model: nn.Module) -> list[list[Tensor]]:
    """What a checkpoint holds besides parameters, by type and device."""
    buffers = {id(buffer) for buffer in model.buffers()}
    groups: dict[Any, dict[int, Tensor]] = {}
    for value in model.state_dict(keep_vars=True).values():
        if id(value) in buffers and value.numel():
            groups.setdefault((value.dtype, value.device), {})[id(value)] = value
    return [list(group.values()) for group in groups.values()]
