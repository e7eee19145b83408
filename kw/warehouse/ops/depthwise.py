"""Depthwise layers: every channel of every sample is a channel of one depthwise convolution.

Legend: B samples (b of a chunk), m mixtures, n cells, C channels, k kernel size, K = k_1 .. k_d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .assembly import BlockGradients, join, mix, sample_chunks, scratch_bytes, to_blocks, to_kernels
from .contraction import Contraction, Cost, Needs, Problem
from .library import (
    LARGE_KERNEL,
    RELAYOUT_MACS,
    convolve,
    convolve_backward,
    convolve_each,
    convolve_each_backward,
    slowdown,
)
from .spec import ConvSpec

__all__ = ["Depthwise"]

# Values of a sample from which a separate call (0.1 ms) is faster: in the forward pass and for
# small kernels, and for gradients of large kernels. Measured with oneDNN on two cores, batch 8;
# shifting and adding K times was slower everywhere.
_WORTH_A_CALL = 1 << 17
_WORTH_A_CALL_LARGE = 1 << 16


class Depthwise(Contraction):
    """Assemble, which is cheap for depthwise layers, then one depthwise convolution of ``B * C``
    channels.

    On CPU, large channels-last images are convolved one by one, and so are gradients of large
    kernels: the library is several times faster that way.
    """

    name = "depthwise"

    def refusal(self, problem: Problem) -> str | None:
        return None if problem.spec.is_depthwise else "does depthwise layers only"

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        by_sample = _is_cpu_2d(x) and _by_sample(x[0].numel(), _lies_last(x), spec, False)
        apply = convolve_each if by_sample else convolve
        parts = []
        for chunk in sample_chunks(len(x), _scratch(spec), x):
            kernels = to_kernels(mix(alpha[chunk], cells, x.dtype), spec.partition)
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
        part, mask = spec.partition, (needs[0], needs[1] or needs[2])
        by_sample = _is_cpu_2d(x) and _by_sample(x[0].numel(), _lies_last(x), spec, True)
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
        cost = self._pass_cost(problem, 1, backward=False)
        return cost + self._pass_cost(problem, 2, backward=True) if problem.training else cost

    @staticmethod
    def _pass_cost(problem: Problem, convolutions: int, backward: bool) -> Cost:
        spec, last = problem.spec, problem.channels_last
        is_cpu_2d = problem.device == "cpu" and len(problem.size) == 2
        by_sample = is_cpu_2d and _by_sample(problem.input_numel, last, spec, backward)
        products = 3 if backward else 1  # the kernels, d alpha, d cells
        activations = problem.input_numel + problem.output_numel
        slow: float = convolutions * problem.conv_macs
        copied = 0.0
        if by_sample != last and problem.device == "cpu":
            slow += RELAYOUT_MACS * problem.batch * activations * convolutions
        elif last and problem.device != "cpu":  # to channels first and back
            copied = 2 * problem.batch * activations * convolutions
        if backward and is_cpu_2d and not by_sample:
            slow *= slowdown(spec)
        values = convolutions * activations + (products + 2 * convolutions) * problem.kernel_numel
        scratch = _scratch(spec) * problem.batch * problem.itemsize
        chunks = max(math.ceil(scratch / scratch_bytes(problem.device)), 1)
        return Cost(
            dense_macs=products * problem.assembly_macs,
            slow_macs=slow,
            bytes=problem.itemsize
            * (problem.batch * values + products * chunks * problem.cells_numel),
            launches=chunks * (products + 1)
            + (12 * problem.batch if by_sample else convolutions)
            + (2 * convolutions if copied else 0),
            waiting_bytes=problem.itemsize * copied,
        )


def _by_sample(values: int, channels_last: bool, spec: ConvSpec, backward: bool) -> bool:
    """Whether to convolve images one by one, channels last; ``values`` of one image."""
    if backward and math.prod(spec.partition.kernel) > LARGE_KERNEL:
        return values >= _WORTH_A_CALL_LARGE
    return channels_last and values >= _WORTH_A_CALL


def _scratch(spec: ConvSpec) -> int:
    """Values of a sample: its blocks, kernels and the kernels' gradients."""
    return 3 * math.prod(spec.partition.kernel_shape)


def _is_cpu_2d(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dim() == 4


def _lies_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
