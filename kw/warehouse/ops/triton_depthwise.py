"""Depthwise layers on GPUs by Triton kernels that read and write channels-last images as they lie.

Legend: B samples (b of a chunk), K kernel positions, C channels.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from torch import Tensor

from . import triton_launch as launch
from .admission import bucket
from .assembly import BlockGradients, mix, sample_chunks, scratch_bytes, to_blocks, to_taps
from .contraction import Contraction, Cost, Gradients, Needs, Problem
from .layout import channels_last, empty
from .spec import ConvSpec
from .triton_conv import refusal_of_kernels

_WARPS = 4
_COPIES = 3
"""Blocks, taps, and in the backward pass the gradients of the taps."""


class TritonDepthwise(Contraction):
    """Assemble by one matrix product, which is cheap for depthwise layers, then one kernel a pass
    and residue of the stride."""

    name: ClassVar[str] = "triton_depthwise"

    def refusal(self, problem: Problem) -> str | None:
        if not problem.spec.is_depthwise or problem.spec.out_channels != problem.spec.in_channels:
            return "does depthwise layers with as many outputs as inputs only"
        return refusal_of_kernels(problem)

    def needs_trial(self, problem: Problem) -> bool:
        return problem.device == "cuda"  # elsewhere they are interpreted

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        x = channels_last(x)
        y = empty(x, x.shape[1], spec.output_size(x.shape[2:]), last=True)
        axes = launch.forward_axes(spec, tuple(x.shape[2:]))
        for chunk in sample_chunks(len(x), _COPIES * _taps(spec), x):
            taps = _assembled(alpha[chunk], cells, x, spec)
            _convolve(x[chunk], taps, y[chunk], axes, spec)
        return y

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        x, grad, size = channels_last(x), channels_last(grad), tuple(x.shape[2:])
        dx = None
        if needs[0]:
            dx = empty(x, x.shape[1], size, last=True)
            if not launch.reaches_all(spec, size):
                dx.zero_()
        gradients = BlockGradients(alpha, cells, needs)
        for chunk in sample_chunks(len(x), _COPIES * _taps(spec), x):
            if dx is not None:
                taps = _assembled(alpha[chunk], cells, x, spec)
                for axes in itertools.product(*launch.transposed_axes(spec, size)):
                    if all(axis.taps for axis in axes):
                        _convolve(grad[chunk], taps, dx[chunk], list(axes), spec)
            if needs[1] or needs[2]:
                dtaps = _gradient(x[chunk], grad[chunk], spec)
                gradients.add(to_blocks(dtaps, spec.partition), chunk)
        return dx, gradients.alpha, gradients.cells

    def cost(self, problem: Problem) -> Cost:
        spec = problem.spec
        residues = math.prod(spec.stride)
        activations = problem.batch * (problem.input_numel + problem.output_numel)
        passes = 3 if problem.training else 1  # y; dX and dW
        products = 4 if problem.training else 1  # the taps twice, d alpha, d cells
        values = passes * activations + (products + passes) * problem.batch * problem.kernel_numel
        # Images that lie channels first are copied, both ways.
        copied = 0 if problem.channels_last else 2 * (2 if problem.training else 1) * activations
        scratch = _COPIES * _taps(spec) * problem.batch * problem.itemsize
        chunks = max(math.ceil(scratch / scratch_bytes(problem.device)), 1)
        slow = passes * problem.conv_macs
        if problem.device == "cpu":  # interpreted: correct, but thousands of times slower
            slow *= 1000
        return Cost(
            dense_macs=products * problem.assembly_macs,
            slow_macs=slow,
            bytes=problem.itemsize * (values + copied + products * chunks * problem.cells_numel),
            launches=chunks * (products + 2 + (residues + 1 if problem.training else 0)),
        )


def _taps(spec: ConvSpec) -> int:
    return math.prod(spec.partition.kernel_shape)


def _assembled(alpha: Tensor, cells: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    """Every sample's kernel by position, ``[b, K, C, 1]``."""
    return to_taps(mix(alpha, cells, x.dtype), spec.partition).contiguous()


def _convolve(x: Tensor, taps: Tensor, y: Tensor, axes: list[launch.Axis], spec: ConvSpec) -> None:
    """Write positions of ``y [b, C, *space]`` from ``x`` and ``taps [b, K, C, 1]``."""
    kernels = launch.kernel_module("triton_depthwise_kernels")
    axes, channels = launch.pad_axes(axes), x.shape[1]
    y_b, (start, y_space) = y.stride(0), launch.written_positions(y, axes)
    first, w_space = launch.taps_of(spec, axes, channels)
    w, y = launch.shift(taps, first), launch.shift(y, start)
    positions = math.prod(axis.count for axis in axes)
    tile_p, tile_c = _tile(channels, x.itemsize)
    with torch.cuda.device_of(x):
        kernels.depthwise[(-(-positions // tile_p) * -(-channels // tile_c) * len(x),)](
            x, w, y,
            x.stride(0), *launch.pad(x.stride()[2:], 0),
            y_b, *y_space,
            taps.stride(0), *w_space,
            channels, *launch.positions_of(axes), *(axis.taps for axis in axes),
            TILE_P=tile_p, TILE_C=tile_c, num_warps=_WARPS,
        )  # fmt: skip


def _gradient(x: Tensor, grad: Tensor, spec: ConvSpec) -> Tensor:
    """Gradients of the taps, ``[b, K, C, 1]``."""
    kernels = launch.kernel_module("triton_depthwise_kernels")
    kernel = launch.pad(spec.partition.kernel, 1)
    axes, channels = launch.pad_axes(launch.forward_axes(spec, tuple(x.shape[2:]))), x.shape[1]
    taps = x.new_empty(len(x), math.prod(kernel), channels, 1)
    tile_c = min(max(bucket(channels), 16), 32)
    tile_t = bucket(kernel[-1])
    tile_p = max(2048 // (tile_c * tile_t), 1)
    rows = math.prod(kernel[:-1])
    with torch.cuda.device_of(x):
        kernels.depthwise_gradient[(-(-channels // tile_c) * rows * len(x),)](
            x, grad, taps,
            x.stride(0), *launch.pad(x.stride()[2:], 0),
            grad.stride(0), *launch.pad(grad.stride()[2:], 0),
            taps.stride(0), kernel[-1] * channels, channels,
            channels, *launch.positions_of(axes), *kernel,
            TILE_T=tile_t, TILE_P=tile_p, TILE_C=tile_c, num_warps=_WARPS,
        )  # fmt: skip
    return taps


def _tile(channels: int, itemsize: int) -> tuple[int, int]:
    """Positions and channels of a program: runs of 128 bytes, 16 sums a thread; fewer where values
    are loaded one by one, which takes a register for each address."""
    tile_c = min(max(bucket(channels), 16), 128 // itemsize)
    return (512 if channels % 16 else 2048) // tile_c, tile_c
