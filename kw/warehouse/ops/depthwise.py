"""Depthwise layers: every channel of every sample is a channel of one depthwise convolution.

Legend: B samples (b of a chunk), m mixtures, n cells, C channels, k kernel size, K = k_1 .. k_d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .assembly import BlockGradients, join, mix, sample_chunks, scratch_bytes, to_blocks, to_kernels
from .contraction import Contraction, Cost, Needs, Problem
from .library import convolve, convolve_backward, convolve_each, convolve_each_backward
from .spec import ConvSpec

__all__ = ["Depthwise"]

# Measured with oneDNN on two cores, batch 8. Shifting and adding K times was slower everywhere.
# A call costs 0.1 ms: a sample must have as many values for calls of its own to pay.
_WORTH_A_CALL = 1 << 17
# Channels first, the gradient of a 7x7 kernel takes four times as long as channels last (96
# channels at 56x56: 75 ms, 21 sample by sample); that of a 3x3 kernel takes equally long.
_LARGE_KERNEL = 9


class Depthwise(Contraction):
    """Assemble, which is cheap here, and one depthwise convolution of ``B * C`` channels.

    On CPU images that lie channels last are convolved one by one, if they are large enough, and so
    are gradients of large kernels: there the library is several times faster.
    """

    name = "depthwise"

    def refusal(self, problem: Problem) -> str | None:
        return None if problem.spec.is_depthwise else "does depthwise layers only"

    def forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        by_sample = _is_cpu_2d(x) and _lies_last(x) and x[0].numel() >= _WORTH_A_CALL
        apply = convolve_each if by_sample else convolve
        parts = []
        for chunk in sample_chunks(len(x), _scratch(spec), x):
            kernels = to_kernels(mix(alpha[chunk], cells, x.dtype), spec.partition)
            parts.append(apply(x[chunk], kernels, spec))
        return join(parts)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        alpha: Tensor,
        cells: Tensor,
        spec: ConvSpec,
        needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        part, mask = spec.partition, (needs[0], needs[1] or needs[2])
        large = math.prod(part.kernel) > _LARGE_KERNEL
        by_sample = _is_cpu_2d(x) and (large or (_lies_last(x) and x[0].numel() >= _WORTH_A_CALL))
        if by_sample:
            x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
        back = convolve_each_backward if by_sample else convolve_backward
        parts = []
        gradients = BlockGradients(alpha, cells, needs)
        for chunk in sample_chunks(len(x), _scratch(spec), x):
            kernels = to_kernels(mix(alpha[chunk], cells, x.dtype), part)
            into_x, into_kernels = back(grad[chunk], x[chunk], kernels, spec, mask)
            if into_x is not None:
                parts.append(into_x)
            if into_kernels is not None:
                gradients.add(to_blocks(into_kernels.flatten(3).movedim(3, 1), part), chunk)
        return join(parts) if needs[0] else None, gradients.alpha, gradients.cells

    def cost(self, problem: Problem) -> Cost:
        passes = 3 if problem.training else 1  # y; dX and dW
        products = 4 if problem.training else 1  # the kernels twice, d alpha, d cells
        activations = problem.input_numel + problem.output_numel
        if problem.channels_last or problem.training:
            activations *= 2  # brought into the other layout and back
        values = passes * activations + (products + 2 * passes) * problem.kernel_numel
        scratch = _scratch(problem.spec) * problem.batch * problem.itemsize
        chunks = math.ceil(scratch / scratch_bytes(problem.device))
        each = (
            passes * problem.batch if problem.device == "cpu" and problem.channels_last else passes
        )
        return Cost(
            dense_macs=products * problem.assembly_macs,
            slow_macs=passes * problem.conv_macs,
            bytes=problem.itemsize
            * (problem.batch * values + products * chunks * problem.cells_numel),
            launches=chunks * (products + passes) + each,
        )


def _scratch(spec: ConvSpec) -> int:
    """Values of a sample: its blocks, kernels and the kernels' gradients."""
    return 3 * math.prod(spec.partition.kernel_shape)


def _is_cpu_2d(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dim() == 4


def _lies_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
