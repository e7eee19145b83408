"""All back ends by name, and the planner that chooses among them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .bmm import Bmm
from .contraction import Contraction
from .depthwise import Depthwise
from .grouped import conv_grouped
from .kernels import Kernels
from .mix_inputs import MixInputs
from .native import Native
from .planner import Planner
from .reference import conv_reference
from .spec import ConvSpec
from .triton_conv import TritonConv
from .triton_on_chip import TritonOnChip

__all__ = ["BACKENDS", "CONTRACTIONS", "YARDSTICKS", "planner"]

YARDSTICKS: dict[str, Callable[[Tensor, Tensor, Tensor, ConvSpec], Tensor]] = {
    "reference": conv_reference,
    "grouped": conv_grouped,
}
"""Ordinary differentiable code, which the others are tested against and compared with. Autograd
keeps what it keeps; the planner never takes them."""

CONTRACTIONS: dict[str, Contraction] = {
    contraction.name: contraction
    for contraction in (
        Native(),
        TritonConv(),
        TritonOnChip(),
        Depthwise(),
        Kernels(),
        Bmm(),
        MixInputs(),
    )
}
"""Back ends with gradients of their own, the preferred first where costs are equal."""

BACKENDS: tuple[str, ...] = (*YARDSTICKS, *CONTRACTIONS)
"""Names that can be forced on a layer."""

planner = Planner(CONTRACTIONS, fallback="kernels")
