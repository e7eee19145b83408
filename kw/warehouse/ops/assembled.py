"""Every sample's kernel, assembled, and one convolution with as many groups as samples.

Legend: B samples (b of a chunk), m mixtures, n cells, O, I channels, g groups, k kernel size.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from .assembly import BlockGradients, join, mix, sample_chunks, scratch_bytes, to_blocks, to_kernels
from .contraction import Contraction, Cost, Gradients, Needs, Problem
from .layout import lies_channels_last
from .library import (
    RELAYOUT_MACS,
    convolve,
    convolve_backward,
    convolve_each,
    convolve_each_backward,
    slowdown,
)
from .spec import ConvSpec

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

    copies: ClassVar[tuple[int, int]] = (2, 3)
    """Kernels in memory for every sample of a chunk: blocks, kernels, and in the backward pass the
    gradients of the kernels."""

    def refusal(self, problem: Problem) -> str | None:
        return None

    def by_sample(self, x: Tensor, spec: ConvSpec, grad: Tensor | None = None) -> bool:
        """Whether images are convolved one by one; with ``grad``, in the backward pass."""
        if not (is_cpu_2d(x) and spec.groups == 1 and lies_channels_last(x)):
            return False
        return grad is None or kernel_numel(spec) <= max(x[0].numel(), grad[0].numel())

    def _forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        each = self.by_sample(x, spec)
        apply = convolve_each if each else convolve
        parts = []
        for chunk in sample_chunks(len(x), self.copies[0] * kernel_numel(spec), x):
            kernels = _kernels(alpha[chunk], cells, x, spec, each)
            parts.append(apply(x[chunk], kernels, spec))
        return join(parts)

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        part = spec.partition
        each = self.by_sample(x, spec, grad)
        mask = (needs[0], needs[1] or needs[2])
        back = convolve_each_backward if each else convolve_backward
        parts = []
        gradients = BlockGradients(alpha, cells, needs)
        for chunk in sample_chunks(len(x), self.copies[1] * kernel_numel(spec), x):
            if needs[0]:
                kernels = _kernels(alpha[chunk], cells, x, spec, each)
            else:  # only its shape is read
                kernels = x.new_empty(1).expand(len(x[chunk]), *part.kernel_shape)
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
            self.copies[problem.training] * each * problem.itemsize
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


def _kernels(alpha: Tensor, cells: Tensor, x: Tensor, spec: ConvSpec, each: bool) -> Tensor:
    last = each and spec.groups == 1  # laid out as the images that are convolved one by one
    return to_kernels(mix(alpha, cells, x.dtype), spec.partition, last)


def kernel_numel(spec: ConvSpec) -> int:
    """Values of one sample's kernel."""
    return math.prod(spec.partition.kernel_shape)


def is_cpu_2d(x: Tensor) -> bool:
    """Whether these are images on a CPU."""
    return x.device.type == "cpu" and x.dim() == 4
