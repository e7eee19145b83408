"""The number formats of forward pass and loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """The context of forward and loss: autocast to bf16 or fp16, or none for fp32."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)
