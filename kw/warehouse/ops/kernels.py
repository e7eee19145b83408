"""Every sample's kernel, assembled, and one convolution with as many groups as samples.

Legend: B samples (b of a chunk), m mixtures, n cells, O, I channels, g groups, k kernel size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .assembly import BlockGradients, join, mix, sample_chunks, scratch_bytes, to_blocks, to_kernels
from .contraction import Contraction, Cost, Needs, Problem
from .spec import ConvSpec

__all__ = ["Kernels"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Blocks, the kernels that they are moved to, and in the backward pass the kernels' gradients too.
_COPIES = {False: 2, True: 3}


class Kernels(Contraction):
    """Assemble by one matrix product; convolve by one grouped convolution of the library.

    One sample makes an ordinary convolution. So do images that lie channels last on CPU, sample by
    sample: the grouped one would bring them into the other layout and back, and kernels that lie
    channels last are whole rows of the blocks, cheaper to put together (for 64 channels at 56x56:
    7.1 ms against 8.2 and 1.6 for the change of layout, batch 8, two cores).
    """

    name = "kernels"

    def refusal(self, problem: Problem) -> str | None:
        return None

    def forward(self, x: Tensor, alpha: Tensor, cells: Tensor, spec: ConvSpec) -> Tensor:
        last = _by_sample(x, spec)
        convolve = _convolve_each if last else _convolve
        parts = []
        for chunk in sample_chunks(len(x), _COPIES[False] * _kernel_numel(spec), x):
            kernels = to_kernels(mix(alpha[chunk], cells, x.dtype), spec.partition, last)
            parts.append(convolve(x[chunk], kernels, spec))
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
        part = spec.partition
        last = _by_sample(x, spec) and _kernel_numel(spec) <= max(x[0].numel(), grad[0].numel())
        mask = (needs[0], needs[1] or needs[2])
        back = _convolve_each_backward if last else _convolve_backward
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
        return Cost(
            dense_macs=products * problem.assembly_macs
            + (0 if slow else passes * problem.conv_macs),
            slow_macs=passes * problem.conv_macs if slow else 0,
            bytes=problem.itemsize
            * (kernels + activations + products * chunks * problem.cells_numel),
            launches=chunks * (products + 2 * passes),
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


def _convolve(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    batch = len(x)
    y = _CONV[len(spec.stride)](
        x.reshape(1, -1, *x.shape[2:]) if batch > 1 else x,  # [1, b * I, ...]
        kernels.flatten(0, 1),  # [b * O, I / g, k..]
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        batch * spec.groups,
    )
    return y.view(batch, -1, *y.shape[2:]) if batch > 1 else y  # [b, O, ...]


def _convolve_each(x: Tensor, kernels: Tensor, spec: ConvSpec) -> Tensor:
    return torch.cat([_convolve(x[i : i + 1], kernels[i : i + 1], spec) for i in range(len(x))])


def _convolve_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    batch, dims = len(x), len(spec.stride)
    into_x, into_kernels, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]) if batch > 1 else grad,
        x.reshape(1, -1, *x.shape[2:]) if batch > 1 else x,
        kernels.flatten(0, 1),
        None,
        spec.stride,
        spec.padding,
        spec.dilation,
        False,
        (0,) * dims,
        batch * spec.groups,
        (*mask, False),
    )
    return (
        into_x.reshape(x.shape) if mask[0] and batch > 1 else into_x,
        into_kernels.unflatten(0, (batch, -1)) if mask[1] else None,
    )


def _convolve_each_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, spec: ConvSpec, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    ones = [slice(i, i + 1) for i in range(len(x))]
    parts = [_convolve_backward(grad[i], x[i], kernels[i], spec, mask) for i in ones]
    into_x, into_kernels = (
        torch.cat([p for p in side if p is not None]) if wanted else None
        for side, wanted in zip(zip(*parts, strict=True), mask, strict=True)
    )
    return into_x, into_kernels
