"""Convolutions of every kind and how their kernels are cut, for the tests of contractions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from kw.warehouse import KernelShape, partition_kernels
from kw.warehouse.ops import ConvSpec, Problem


def problem(channels=64, size=14, kernel=3, batch=8, ratio=1.0, **rest) -> Problem:
    warehouse = partition_kernels(
        [KernelShape(channels, channels, (kernel, kernel))], cell_num_ratio=ratio
    )
    spec = ConvSpec(warehouse.layers[0], (1, 1), (kernel // 2,) * 2, (1, 1))
    return Problem(spec, warehouse.cells, batch, (size, size), **rest)


@dataclass
class Case:
    """One convolution and how its kernel is cut; odd sizes throughout."""

    kernel: tuple[int, ...]
    size: tuple[int, ...]
    channels: tuple[int, int] = (4, 6)
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    batch: int = 3
    settings: dict[str, Any] = field(default_factory=dict)

    def axes(self, value):
        return (value,) * len(self.kernel) if isinstance(value, int) else value

    def make(self):
        """``(x, alpha, cells, spec)`` in float64, all three with gradients."""
        torch.manual_seed(0)
        i, o = self.channels
        shape = KernelShape(o, i, self.kernel, self.groups)
        warehouse = partition_kernels([shape], **self.settings)
        spec = ConvSpec(
            warehouse.layers[0],
            self.axes(self.stride),
            self.axes(self.padding),
            self.axes(self.dilation),
            self.groups,
        )
        shapes = (
            (self.batch, i, *self.size),
            (self.batch, spec.partition.mixtures, warehouse.cells),
            (warehouse.cells, math.prod(warehouse.cell_shape)),
        )
        tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        return *tensors, spec


HALVES = {"cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
WHOLE = {"spatial_partition": False}
CASES = {
    "1d": Case((3,), (9,)),
    "1d even kernel, stride, dilation": Case((4,), (17,), stride=3, padding=2, dilation=2),
    "1d pointwise": Case((1,), (7,), settings=HALVES),
    "2d": Case((3, 3), (7, 5), padding=1, settings=HALVES),
    "2d whole cells": Case((3, 3), (7, 5), padding=1, settings={**WHOLE, **HALVES}),
    "2d uneven in every way": Case(
        (3, 2), (9, 11), stride=(2, 1), padding=(2, 0), dilation=(1, 3), settings=HALVES
    ),
    "2d many cells": Case((3, 3), (5, 5), settings={"cell_num_ratio": 4}),
    "2d few cells": Case((2, 2), (5, 5), settings={"cell_num_ratio": 0.5, **HALVES}),
    "2d one filter": Case((3, 3), (7, 5), channels=(4, 1), padding=1),
    "2d one sample": Case((3, 3), (7, 5), padding=1, batch=1),
    "2d grouped": Case((3, 3), (7, 5), stride=2, padding=1, groups=2, settings=HALVES),
    "2d grouped whole cells": Case((3, 3), (7, 5), groups=2, settings=WHOLE),
    "2d grouped one sample": Case((3, 3), (7, 5), groups=2, batch=1),
    "2d depthwise": Case((5, 5), (7, 9), channels=(6, 6), padding=2, groups=6),
    "2d depthwise multiplier": Case((3, 3), (7, 9), channels=(3, 6), groups=3, settings=WHOLE),
    "2d larger than its input": Case((7, 7), (3, 3), padding=3),
    "2d pointwise": Case((1, 1), (5, 7)),
    "2d pointwise strided": Case((1, 1), (5, 8), stride=(2, 3), settings=HALVES),
    "2d pointwise padded": Case((1, 1), (5, 4), stride=2, padding=(1, 0), dilation=2),
    "2d pointwise grouped": Case((1, 1), (5, 7), groups=2, settings={"cell_num_ratio": 2}),
    "2d pointwise depthwise": Case((1, 1), (5, 7), channels=(6, 6), groups=6),
    "2d pointwise one position": Case((1, 1), (1, 1), batch=1),
    "3d": Case((3, 1, 2), (5, 4, 3), stride=(1, 2, 1), padding=(1, 0, 1), settings=HALVES),
    "3d whole cells, grouped": Case((2, 3, 3), (4, 5, 5), groups=2, padding=1, settings=WHOLE),
    "3d pointwise": Case((1, 1, 1), (3, 2, 5), stride=2),
}
