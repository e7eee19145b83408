"""Convolution with TensorFlow's padding, which depends on the size of the input.

timm's ``tf_*`` networks use it (``timm.layers.Conv2dSame``). torch's ``padding="same"`` differs: it
is defined for stride 1 only and does not depend on the input.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .layers import KWConv2d


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> int:
    """Zeros that an axis of ``size`` positions lacks for ``ceil(size / stride)`` outputs.

    Without a maximum where none is needed, and without the size at stride 1: in a traced graph the
    sizes of all layers before stand in it, and what compares them takes minutes.
    """
    reach = (kernel - 1) * dilation + 1 - stride
    if stride == 1:
        return reach
    missing = reach + -size % stride
    return missing if reach >= 0 else max(missing, 0)


class KWConv2dSame(KWConv2d):
    """:class:`KWConv2d` whose output has ``ceil(size / stride)`` positions along every axis.

    Both ends are padded equally; an odd number puts one more zero at the far end.

    Args:
        padding: must be 0, the sizes follow from the input.

    Raises:
        ValueError: another ``padding``, or a ``padding_mode`` other than zeros.
    """

    def _lay_out(self) -> None:
        super()._lay_out()
        if any(self.spec.padding) or self._pad_before is not None:
            raise ValueError(
                f"KWConv2dSame pads by its input's size; give padding 0, not {self.padding!r} "
                f"({self.padding_mode})"
            )

    def pad(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        geometry = self.kernel_size, self.spec.stride, self.spec.dilation
        for axis in zip(x.shape[2:], *geometry, strict=True):
            missing = same_padding(*axis)
            sides = [missing // 2, missing - missing // 2, *sides]  # F.pad begins with the last
        return F.pad(x, sides)
