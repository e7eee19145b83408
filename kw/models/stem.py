"""A stem for small images.

A ResNet's own stem, a 7x7 convolution of stride 2 and a pooling of stride 2, leaves a quarter of
the input's resolution to the first stage: of 64 pixels, 16. Networks for CIFAR (He et al., CVPR
2016, section 4.2) start with one 3x3 convolution and no pooling.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def set_small_stem(network: nn.Module, stride: int = 1, pool: bool = False) -> None:
    """Give a timm ResNet a stem of one 3x3 convolution; its channels stay.

    Args:
        network: a timm ResNet, changed in place, with fresh weights.
        stride: of the convolution.
        pool: keep the max-pooling of stride 2.

    Raises:
        ValueError: the network has no stem of one convolution named ``conv1``, followed by
            ``maxpool``.
    """
    convolution, pooling = (getattr(network, name, None) for name in ("conv1", "maxpool"))
    if not isinstance(convolution, nn.Conv2d) or not isinstance(pooling, nn.MaxPool2d):
        raise ValueError(
            "expected a ResNet with a stem of one convolution (conv1) and a pooling (maxpool)"
        )
    small = nn.Conv2d(
        convolution.in_channels, convolution.out_channels, 3, stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")  # timm's for ResNets
    any_network: Any = network
    any_network.conv1 = small
    if not pool:
        any_network.maxpool = nn.Identity()
    # What timm says of resolutions: that of the convolution, then those of the stages.
    first, *stages = any_network.feature_info
    first["reduction"] = stride
    for info in stages:
        info["reduction"] = info["reduction"] // 4 * stride * (2 if pool else 1)
