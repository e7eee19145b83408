"""Compile the Triton kernels for a Hopper GPU, without one, and print what became of them.

Run by ``test_triton_compiled.py`` in a process of its own, since Triton's driver is replaced.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kw.warehouse import KernelShape, partition_kernels
from kw.warehouse.ops import ConvSpec, triton_kernels, triton_launch
from kw.warehouse.ops.triton_conv import TritonConv


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, found: list[dict[str, Any]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            binary = self.kernel.run(*args, grid=grid, warmup=True, **options)
            ptx = binary.asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+),", ptx)
            self.found.append(
                {
                    "kernel": self.kernel.__name__,
                    "products": ptx.count("wgmma.mma_async"),
                    "copies": sorted({int(size, 16) for size in copies}),
                    "plain loads": len(re.findall(r"ld\.global\.(?!v4)", ptx)),
                    "shared": binary.metadata.shared,
                }
            )

        return compile_only


def compile_layer(channels: int, kernel: int, size: int, found: list[dict[str, Any]]) -> None:
    """Both passes of one layer in bfloat16, tiles as for 128 samples."""
    warehouse = partition_kernels([KernelShape(channels, channels, (kernel, kernel))])
    spec = ConvSpec(warehouse.layers[0], (1, 1), (kernel // 2, kernel // 2), (1, 1))
    x = torch.empty(1, channels, size, size, dtype=torch.bfloat16)
    if kernel > 1:
        x = x.contiguous(memory_format=torch.channels_last)
    alpha = torch.empty(1, spec.partition.mixtures, warehouse.cells)
    cells = torch.empty(warehouse.cells, channels * channels, dtype=torch.bfloat16)
    backend = TritonConv()
    y = backend.forward(x, alpha, cells, spec)
    backend.backward(torch.empty_like(y), x, alpha, cells, spec, (True, True, True))


def main() -> None:
    driver.set_active(Hopper())
    found: list[dict[str, Any]] = []
    for name in ("convolve", "kernel_gradient"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name), found))
    for name in ("tiles_of_convolution", "tiles_of_gradient"):
        rule = getattr(triton_launch, name)
        setattr(triton_launch, name, lambda b, *s, rule=rule: rule(128 * b, *s))
    compile_layer(128, 3, 28, found)
    compile_layer(128, 1, 28, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
