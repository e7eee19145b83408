"""What a contraction needs to know besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ..partition import Partition

__all__ = ["ConvSpec"]


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with assembled kernels: the kernel's partition and how it slides.

    Attributes:
        partition: blocks and cells of the kernel.
        stride: per spatial axis.
        padding: zeros on either side, per spatial axis.
        dilation: per spatial axis.
        groups: groups of the convolution.
    """

    partition: Partition
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
