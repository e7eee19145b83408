"""The attention branch: from a layer's input to the coefficients of its mixtures.

Paper: KernelWarehouse (ICML 2024, arXiv 2406.07879), contrasting-driven attention function, Eq. 5;
the other attention functions are those of its ablation.

Legend: B samples, C input channels, h hidden units, m mixtures, n cells (the null cell not
    counted).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ATTENTION_FUNCTIONS
from .ops.coefficients import EPS, annealed, contrasting, fused_coefficients, is_fused
from .ops.precision import coefficient_type
from .partition import CellSlice
from .sharded import placed_like

ATTENTION_FUNCTIONS.register()(contrasting)


@ATTENTION_FUNCTIONS.register()
def softmax(logits: Tensor) -> Tensor:
    """Positive coefficients that compete and sum to one."""
    return logits.softmax(-1)


@ATTENTION_FUNCTIONS.register()
def sigmoid(logits: Tensor) -> Tensor:
    """Independent coefficients in (0, 1)."""
    return logits.sigmoid()


@ATTENTION_FUNCTIONS.register()
def rectified(logits: Tensor) -> Tensor:
    """``max(z_j, 0) / (sum_p |z_p| + 1e-3)``: the positive part of the contrasting function."""
    return logits.relu() / (logits.abs().sum(-1, keepdim=True) + EPS)


def _ratio_logits(alpha: Tensor, scale: float) -> Tensor:
    # The magnitudes add up to c - eps, so that the denominator of Eq. 5 is c.
    null = scale * (1 - alpha.abs().sum(-1, keepdim=True)) - EPS
    return torch.cat([scale * alpha, null], -1)


def _softmax_logits(alpha: Tensor, scale: float) -> Tensor:
    return torch.cat([alpha, 1 - alpha.sum(-1, keepdim=True)], -1).log()


def _sigmoid_logits(alpha: Tensor, scale: float) -> Tensor:
    return torch.cat([alpha.logit(), torch.zeros_like(alpha[..., :1])], -1)


LOGITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "contrasting": _ratio_logits,
    "softmax": _softmax_logits,
    "sigmoid": _sigmoid_logits,
    "rectified": _ratio_logits,
}
"""The inverses: from coefficients ``[..., n]`` and their scale c to logits ``[..., n + 1]``.

The caller must pass coefficients in the function's range: magnitudes that sum to at most
``1 - eps / c`` (contrasting, rectified), positive ones (all but contrasting) that sum to less than
1 (softmax).
"""


def own_and_other(function: str, scale: float, cells: int) -> tuple[float, float]:
    """Coefficient p of a mixture's own cell and q of every other cell at the start ``"keep"``.

    Contrasting: ``1 - eps / c`` and 0. The others, whose gradient vanishes at 0: ``c / (1 + c)``
    and ``min(c, 1) / (2 n (1 + c))``.
    """
    if function == "contrasting":
        return 1 - EPS / scale, 0.0
    return scale / (1 + scale), min(scale, 1) / (2 * cells * (1 + scale))


class BranchLinear(nn.Linear):
    """A linear layer that its attention initialises. FSDP's recipe resets all modules, parents
    before children, and Hugging Face's networks give every linear layer random weights; this layer
    then keeps the values that the attention has set."""

    _is_hf_initialized = True  # Hugging Face's mark of what is to be left as it is

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        super().reset_parameters()  # random numbers are drawn as nn.Linear draws them

    def reset_parameters(self) -> None:
        """No effect: the attention's ``reset_parameters`` initialises it."""


class KernelAttention(nn.Module):
    """Mixture coefficients ``alpha = (1 - tau) * f(z) + tau * beta`` of one layer.

    ``z`` are the logits over the warehouse's cells and the null cell, which takes part in ``f`` and
    is then dropped; ``beta`` gives every mixture its own cell. The branch computes in float32 even
    under autocast: one normalisation spans hundreds of signed coefficients.

    Args:
        in_channels: channels C of the layer's input.
        cells: cells n of the warehouse.
        own: the layer's cells at temperature 1, and the cell of each mixture.
        reduction: ``h = max(int(C * reduction), 16)``.
        norm: ``"batch"`` (BatchNorm1d) or ``"layer"`` (LayerNorm).
        function: a key of :data:`ATTENTION_FUNCTIONS`.
        nonlocal_basis_ratio: below 1, the logits of cells that are not the layer's own go through a
            shared map of rank ``q = max(int((n - own) * ratio), 16)``; without such cells it has no
            effect.
        nonlocal_own: number of own cells with direct logits, where the ratio is below 1.
        start_scale: scale c of the one-hot start (:meth:`hold_own`) that ``reset_parameters``
            sets; ``None``: the paper's start, random coefficients.

    Raises:
        ValueError: an unknown ``norm`` or ``function``, or a ratio out of its range.
    """

    one_hot: Tensor | None
    lacks_values = False  # whether ``one_hot`` was made on the meta device and not filled since

    def __init__(
        self,
        in_channels: int,
        cells: int,
        own: CellSlice,
        *,
        reduction: float = 0.0625,
        norm: str = "batch",
        function: str = "contrasting",
        nonlocal_basis_ratio: float = 1.0,
        nonlocal_own: int = 0,
        start_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if function not in ATTENTION_FUNCTIONS:
            choices = ", ".join(ATTENTION_FUNCTIONS)
            raise ValueError(f"attention {function!r} is unknown; choose one of {choices}")
        if norm not in ("batch", "layer"):
            raise ValueError(f"attention norm {norm!r} is unknown; choose 'batch' or 'layer'")
        if not 0 < nonlocal_basis_ratio <= 1:
            raise ValueError(f"nonlocal_basis_ratio is {nonlocal_basis_ratio}; expected (0, 1]")
        if start_scale is not None and function not in LOGITS:
            raise ValueError(
                f"attention {function!r} has no inverse (kw.warehouse.attention.LOGITS): it cannot "
                "begin as a static layer; set start='paper'"
            )
        if not reduction > 0:
            raise ValueError(f"reduction is {reduction}; it must be above 0")
        self.function = function
        self.start_scale = start_scale
        self.cells = cells
        self.own = own
        self.mixtures = len(own.owners)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = max(int(in_channels * reduction), 16)
        self.fc1 = BranchLinear(in_channels, hidden, bias=norm == "layer", **factory)
        self.norm1 = (nn.BatchNorm1d if norm == "batch" else nn.LayerNorm)(hidden, **factory)
        self.fc3: nn.Linear | None = None
        if nonlocal_basis_ratio == 1 or nonlocal_own == cells:
            self.fc2 = BranchLinear(hidden, self.mixtures * (cells + 1), **factory)
            self.register_parameter("basis_bias", None)
        else:
            foreign = cells - nonlocal_own
            rank = max(int(foreign * nonlocal_basis_ratio), 16)
            self.nonlocal_split = (nonlocal_own, rank, 1)
            self.fc2 = BranchLinear(
                hidden, self.mixtures * sum(self.nonlocal_split), False, **factory
            )
            self.fc3 = BranchLinear(rank, foreign, bias=False, **factory)
            self.basis_bias = nn.Parameter(torch.empty(self.mixtures * (cells + 1), **factory))
        # beta follows from the partition, so it is not saved. A model built on the meta device gets
        # its values when it is loaded; with the first input where that bypasses load_state_dict, as
        # Hugging Face's from_pretrained does.
        one_hot = torch.empty(self.mixtures, cells, **factory)
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.lacks_values = one_hot.is_meta
        self.register_load_state_dict_post_hook(_restore_one_hot)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out, ReLU) linear weights, zero biases, and the one-hot assignment;
        then :meth:`hold_own`, if ``start_scale`` is given."""
        held = None if self.start_scale is None else self.fc2  # becomes zero
        for linear in (self.fc1, self.fc2, self.fc3):
            if linear is not None and linear is not held:
                nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        if self.basis_bias is not None:
            nn.init.zeros_(self.basis_bias)
        self.norm1.reset_parameters()
        _restore_one_hot(self)
        if self.start_scale is not None and not self.fc1.weight.is_meta:
            self.hold_own(self.start_scale)

    @torch.no_grad()
    def hold(self, alpha: Tensor, scale: float) -> None:
        """Give every mixture the coefficients ``alpha`` at temperature 0, for every input.

        The logits' weights become zero and their biases the logits that give ``alpha``. The biases
        and weights train as before: the hidden units are not zero.

        Args:
            alpha: ``[m, n]``; must be in the function's range, which is not checked
                (:data:`LOGITS`).
            scale: c, the scale of the logits: the larger, the slower coefficients change.
        """
        logits = LOGITS[self.function](alpha, scale).flatten()
        bias = self.fc2.bias if self.basis_bias is None else self.basis_bias
        nn.init.zeros_(self.fc2.weight)
        bias.copy_(placed_like(logits, bias))

    @torch.no_grad()
    def hold_own(self, scale: float) -> None:
        """:meth:`hold` every mixture's own cell (budgets of 1 and more).

        Args:
            scale: c, as for :meth:`hold`; it determines the coefficients (:func:`own_and_other`).
        """
        own, other = own_and_other(self.function, scale, self.cells)
        shape = (self.mixtures, self.cells)
        alpha = torch.full(shape, other, dtype=torch.float64, device="cpu")
        alpha[range(self.mixtures), list(self.own.owners)] = own
        self.hold(alpha, scale)

    def forward(self, pooled: Tensor, temperature: Tensor | None) -> Tensor:
        """Coefficients of every mixture.

        Args:
            pooled: the layer's input averaged over positions, ``[B, C]``, float32.
            temperature: scalar tau in [0, 1]; ``None`` once it is fixed at 0
                (:func:`kw.warehouse.fold_temperature`).

        Returns:
            ``[B, m, n]``; float32, on GPUs in the type of :func:`~.ops.precision.coefficient_type`.
        """
        if self.lacks_values:
            _restore_one_hot(self)
        dtype = coefficient_type(pooled.device.type)
        with full_precision(pooled):
            logits = self._logits(pooled.to(self.fc1.weight.dtype))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            function = ATTENTION_FUNCTIONS.entries[self.function]
            if function is contrasting and is_fused(logits, self.one_hot, temperature, dtype):
                return fused_coefficients(logits, self.one_hot, temperature, dtype)
            alpha = function(logits)[..., :-1]  # the null cell is dropped
            return annealed(alpha, self.one_hot, temperature)

    def _logits(self, pooled: Tensor) -> Tensor:
        hidden = normalise(self.norm1, self.fc1(pooled)).relu()
        logits = self.fc2(hidden).unflatten(-1, (self.mixtures, -1))  # [B, m, n + 1 or own + q + 1]
        if self.fc3 is None:
            return logits
        own, shared, null = logits.split(self.nonlocal_split, dim=-1)
        foreign = self.fc3(shared)
        start = self.own.start
        parts = (foreign[..., :start], own, foreign[..., start:], null)
        return torch.cat(parts, dim=-1) + self.basis_bias.view(self.mixtures, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelAttention:
        super()._apply(fn, recurse)
        self.lacks_values |= self.one_hot is not None and self.one_hot.is_meta
        return self

    def extra_repr(self) -> str:
        return f"mixtures={self.mixtures}, cells={self.cells}, function={self.function}"


def full_precision(pooled: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast: a branch computes in the type of its weights."""
    device = pooled.device.type
    # The meta device has no autocast.
    return torch.autocast(device, enabled=False) if device != "meta" else nullcontext()


def normalise(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden units ``[B, h]`` through a branch's normalisation, for a batch of any size."""
    if norm.training and hidden.shape[0] < 2 and isinstance(norm, nn.BatchNorm1d):
        # One sample has no variance over the batch: use the running statistics.
        return F.batch_norm(
            hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    return norm(hidden)


@torch.no_grad()
def _restore_one_hot(attention: KernelAttention, _incompatible_keys: object = None) -> None:
    weight, one_hot = attention.fc1.weight, attention.one_hot
    if one_hot is None:
        return
    if one_hot.device != weight.device:
        attention.one_hot = one_hot = torch.empty_like(one_hot, device=weight.device)
    attention.lacks_values = one_hot.is_meta
    if one_hot.is_meta:
        return
    owned = [(i, cell) for i, cell in enumerate(attention.own.owners) if cell is not None]
    rows, columns = torch.tensor(owned, device=one_hot.device).unbind(1)
    one_hot.zero_()[rows, columns] = 1
