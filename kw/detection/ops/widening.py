"""In which types the operators compute.

float16 and bfloat16 hold coordinates in steps of whole pixels where boxes lie, and not all compiled
operators take them; all operators compute in float32 at least and round their results once.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

__all__ = ["widen"]


def widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors, detached, in one type: the widest among them and float32."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.detach().to(dtype) for t in tensors]
