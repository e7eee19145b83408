"""The layer's settings that a contraction needs besides its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch.nn.functional as F
from torch import Tensor

from ..partition import Partition


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with assembled kernels: partition, stride, padding, dilation, groups.

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

    @property
    def out_channels(self) -> int:
        """O."""
        return self.partition.kernel_shape[0]

    @property
    def in_channels(self) -> int:
        """I, over all groups."""
        return self.partition.kernel_shape[1] * self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether every position of the output reads one position of the input."""
        return all(k == 1 for k in self.partition.kernel)

    @property
    def has_no_stride(self) -> bool:
        """Whether every stride is 1."""
        return all(s == 1 for s in self.stride)

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel reads one input channel of several."""
        return self.groups > 1 and self.partition.kernel_shape[1] == 1

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for an input of that size.

        Raises:
            ValueError: the kernel is larger than the padded input.
        """
        kernels = self.partition.kernel
        axes = zip(size, kernels, self.stride, self.padding, self.dilation, strict=True)
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        if any(n < 1 for n in out):
            kernel = "x".join(map(str, self.partition.kernel))
            raise ValueError(
                f"kernel {kernel} (dilation {self.dilation}) exceeds the input {tuple(size)} "
                f"with padding {self.padding}"
            )
        return out

    def axes(self, size: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Per spatial axis output and input size, stride, padding, dilation and kernel size."""
        out, kernels = self.output_size(size), self.partition.kernel
        return zip(out, size, self.stride, self.padding, self.dilation, kernels, strict=True)

    def conv(self, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        """torch's convolution of all samples with one kernel, in so many groups."""
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        return conv(x, kernel, None, self.stride, self.padding, self.dilation, groups)

    def encode(self) -> list[int]:
        """The spec as integers, the form in which it passes through ``torch.library``."""
        part = self.partition
        dims = len(part.kernel)
        head = [dims, self.groups, part.cell_out, part.cell_in, *part.grid]
        axes = (part.kernel, part.cell_kernel, self.stride, self.padding, self.dilation)
        return [*head, *(value for axis in axes for value in axis)]

    @staticmethod
    def decode(code: Sequence[int]) -> ConvSpec:
        """The inverse of :meth:`encode`."""
        return _decode(tuple(code))


@cache
def _decode(code: tuple[int, ...]) -> ConvSpec:
    dims, groups, cell_out, cell_in, *rest = code
    spatial, out_blocks, in_blocks, *axes = rest
    kernel, cell_kernel, stride, padding, dilation = (
        tuple(axes[i : i + dims]) for i in range(0, 5 * dims, dims)
    )
    part = Partition(kernel, cell_kernel, cell_out, cell_in, (spatial, out_blocks, in_blocks))
    return ConvSpec(part, stride, padding, dilation, groups)
