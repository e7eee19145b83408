"""All back ends by name, and the selector that chooses among them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...registry import CONTRACTIONS
from .assembled import Assembled
from .bmm import Bmm
from .depthwise import Depthwise
from .library import conv_grouped
from .mix_inputs import MixInputs
from .native import Native
from .reference import conv_reference
from .selection import Selector
from .spec import ConvSpec
from .triton_conv import TritonConv
from .triton_depthwise import TritonDepthwise
from .triton_on_chip import TritonOnChip

YARDSTICKS: dict[str, Callable[[Tensor, Tensor, Tensor, ConvSpec], Tensor]] = {
    "reference": conv_reference,
    "grouped": conv_grouped,
}
"""Plain autograd code: references for tests and benchmarks. They store all intermediate results,
and the selector never chooses them."""

for _own in (
    Native(),
    TritonConv(),
    TritonOnChip(),
    TritonDepthwise(),
    Depthwise(),
    Assembled(),
    Bmm(),
    MixInputs(),
):
    CONTRACTIONS[_own.name] = _own

BACKENDS: Mapping[str, Any] = ChainMap(CONTRACTIONS, YARDSTICKS)
"""Names for ``backend``, the yardsticks first."""

selector = Selector(CONTRACTIONS, fallback="assembled")
