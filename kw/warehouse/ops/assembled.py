"""Every sample's kernel, assembled, and one convolution with as many groups as samples.

Legend: B samples (b of a chunk), m mixtures, n cells, O, I channels, g groups, k kernel size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .assembly import BlockGradients, join, mix, sample_chunks, scratch_bytes, to_blocks, to_kernels
from .contraction import Contraction, Cost, Needs, Problem
from .library import (
    RELAYOUT_MACS,
    convolve,
    convolve_backward,
    convolve_each,
    convolve_each_backward,
    slowdown,
)
from .spec import ConvSpec

__all__ = ["Assembled"]

# Blocks, kernels, and in the backward pass the gradients of the kernels.
_COPIES = {False: 2, True: 3}

GROUPED = 1.2
"""Measured time of a grouped convolution of all samples, relative to an ordinary convolution."""


class Assembled(Contraction):
    """Assemble by one matrix product; convolve by one grouped convolution of the library.

    For one sample this is an ordinary convolution. On CPU, channels-last images are convolved one
    by one: a grouped convolution would convert their layout and back, and channels-last kernels
    are whole rows of the blocks, cheaper to assemble (for 64 channels at 56x56:
    7.1 ms against 8.2 and 1.6 for the change of layout, batch 8, two cores).
    """

    name = "assembled"
    # CPU: seen on two AVX-512 cores, beside what GROUPED counts. GPU: libraries run as many groups
    # as samples at a small part of their rate; not measured here, but reports on the authors'
    # release have 17.5 (ResNet18 4x) and 27 times (ResNet50 4x) the static network's time at
    # batch 128.
    efficiency: ClassVar[dict[str, float]] = {"cpu": 0.6, "cuda": 0.05}

    def refusal(self, problem: Problem) -> str | None:
        return None

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        last = _by_sample(x, spec)
        apply = convolve_each if last else convolve
        parts = []
        for chunk in sample_chunks(len(x), _COPIES[False] * _kernel_numel(spec), x):
            kernels = to_kernels(mix(alpha[chunk], cells, x.dtype), spec.partition, last)
            parts.append(apply(x[chunk], kernels, spec))
        return join(parts)

    def _backward(
        self,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        part = spec.partition
        last = _by_sample(x, spec) and _kernel_numel(spec) <= max(x[0].numel(), grad[0].numel())
        mask = (needs[0], needs[1] or needs[2])
        back = convolve_each_backward if last else convolve_backward
        parts = []
        gradients = BlockGradients(alpha, cells, needs)
        for chunk in sample_chunks(len(x), _COPIES[True] * _kernel_numel(spec), x):
            if needs[0]:
                kernels = to_kernels(mix(alpha[chunk], cells, x.dtype), part, last)
            else:  # only its shape is read
                kernels = cells.new_empty(1).expand(len(x[chunk]), *part.kernel_shape)
            into_x, into_kernels = back(grad[chunk], x[chunk], kernels, spec, mask)
            del kernels
            if into_x is not None:
                parts.append(into_x)
            if into_kernels is not None:
                blocks = to_blocks(into_kernels.flatten(3).movedim(3, 1), part)
                del into_kernels
                gradients.add(blocks, chunk)
        return join(parts) if needs[0] else None, gradients.alpha, gradients.cells

    def cost(self, problem: Problem) -> Cost:
        spec, each = problem.spec, problem.kernel_numel
        passes = 3 if problem.training else 1  # y; dX and dW
        products = 4 if problem.training else 1  # the kernels twice, d alpha, d cells
        most = scratch_bytes(problem.device) // (
            _COPIES[problem.training] * each * problem.itemsize
        )
        chunks = -(-problem.batch // max(most, 1))
        slow = spec.is_depthwise
        # Each product writes or reads the blocks, a permuted copy reads and writes them, and a
        # convolution reads or writes the kernels.
        kernels = problem.batch * each * ((4 + 8 + 3) if problem.training else 4)
        activations = problem.batch * (problem.input_numel + problem.output_numel) * passes
        if problem.device == "cpu" and not problem.channels_last and not slow:
            activations *= 3  # oneDNN converts them to blocked layouts and back
        # Blocks to kernels, and back for the gradients.
        slow_macs: float = RELAYOUT_MACS * passes * problem.batch * each
        if slow:
            backward = 2 * (slowdown(spec) if problem.device == "cpu" else 1)
            slow_macs += (1 + backward * problem.training) * problem.conv_macs
        copied = 0
        if problem.channels_last and problem.device != "cpu":  # to channels first and back
            copied = 2 * activations
        elif problem.channels_last and spec.groups > 1:
            slow_macs += RELAYOUT_MACS * activations
        return Cost(
            dense_macs=products * problem.assembly_macs
            + (0 if slow else passes * problem.conv_macs * GROUPED),
            slow_macs=slow_macs,
            bytes=problem.itemsize
            * (kernels + activations + products * chunks * problem.cells_numel),
            launches=chunks * (products + 2 * passes + (2 * passes if copied else 0)),
            waiting_bytes=problem.itemsize * copied,
        )


def _kernel_numel(spec: ConvSpec) -> int:
    out, in_, *size = spec.partition.kernel_shape
    return out * in_ * torch.Size(size).numel()


def _by_sample(x: Tensor, spec: ConvSpec) -> bool:
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and spec.groups == 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )
