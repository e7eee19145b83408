"""Depthwise layers: every channel of every sample is a channel of one depthwise convolution.

Legend: B samples (b of a chunk), m mixtures, n cells, C channels, k kernel size, K = k_1 .. k_d.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from .assembled import Assembled, is_cpu_2d
from .assembly import scratch_bytes
from .contraction import Cost, Gradients, Needs, Problem
from .layout import channels_last, lies_channels_last
from .library import LARGE_KERNEL, RELAYOUT_MACS, slowdown
from .spec import ConvSpec

# Values of a sample from which a separate call (0.1 ms) is faster: in the forward pass and for
# small kernels, and for gradients of large kernels. Measured with oneDNN on two cores, batch 8;
# shifting and adding K times was slower everywhere.
_WORTH_A_CALL = 1 << 17
_WORTH_A_CALL_LARGE = 1 << 16


class Depthwise(Assembled):
    """Assemble, which is cheap for depthwise layers, then one depthwise convolution of ``B * C``
    channels.

    On CPU, large channels-last images are convolved one by one, and so are gradients of large
    kernels: the library is several times faster that way.
    """

    name = "depthwise"
    efficiency: ClassVar[dict[str, float]] = {}
    copies = (3, 3)

    def refusal(self, problem: Problem) -> str | None:
        return None if problem.spec.is_depthwise else "does depthwise layers only"

    def by_sample(self, x: Tensor, spec: ConvSpec, grad: Tensor | None = None) -> bool:
        last = lies_channels_last(x)
        return is_cpu_2d(x) and _by_sample(x[0].numel(), last, spec, grad is not None)

    def _backward(
        self, grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec, needs: Needs
    ) -> Gradients:
        if self.by_sample(x, spec, grad):
            grad, x = channels_last(grad), channels_last(x)
        return super()._backward(grad, x, alpha, cells, spec, needs)

    def cost(self, problem: Problem) -> Cost:
        cost = self._pass_cost(problem, 1, backward=False)
        return cost + self._pass_cost(problem, 2, backward=True) if problem.training else cost

    def _pass_cost(self, problem: Problem, convolutions: int, backward: bool) -> Cost:
        spec, last = problem.spec, problem.channels_last
        on_cpu = problem.device == "cpu" and len(problem.size) == 2
        by_sample = on_cpu and _by_sample(problem.input_numel, last, spec, backward)
        products = 3 if backward else 1  # the kernels, d alpha, d cells
        activations = problem.input_numel + problem.output_numel
        slow: float = convolutions * problem.conv_macs
        copied = 0.0
        if by_sample != last and problem.device == "cpu":
            slow += RELAYOUT_MACS * problem.batch * activations * convolutions
        elif last and problem.device != "cpu":  # to channels first and back
            copied = 2 * problem.batch * activations * convolutions
        if backward and on_cpu and not by_sample:
            slow *= slowdown(spec)
        values = convolutions * activations + (products + 2 * convolutions) * problem.kernel_numel
        scratch = self.copies[0] * problem.kernel_numel * problem.batch * problem.itemsize
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
