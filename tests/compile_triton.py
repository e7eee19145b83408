"""Compile the Triton kernels for a Hopper GPU, without one, and print what became of them.

Run by ``test_triton_compiled.py`` in a process of its own, since Triton's driver is replaced.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kw.warehouse import KernelShape, partition_kernels
from kw.warehouse.ops import ConvSpec, triton_kernels, triton_launch, triton_on_chip_kernel
from kw.warehouse.ops.contraction import Contraction
from kw.warehouse.ops.triton_conv import TritonConv
from kw.warehouse.ops.triton_on_chip import _TRITON, TritonOnChip, _triton


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
                    "batched products": ptx.count("mma.sync"),
                    "copies": sorted({int(size, 16) for size in copies}),
                    "plain loads": len(re.findall(r"ld\.global\.(?!v4)", ptx)),
                    "shared": binary.metadata.shared,
                    "threads": 32 * options["num_warps"],
                    "layouts": batched_layouts(binary.asm["ttgir"]),
                    **resources(binary.asm["cubin"]),
                }
            )

        return compile_only


def batched_layouts(code: str) -> list[list[int]]:
    """Of batched operands in shared memory: phases of the swizzle, then sides, nearest first."""
    pattern = r"swizzled_shared<\{.*?maxPhase = (\d+), order = \[(\d), (\d), (\d)\]"
    return sorted([int(n) for n in match] for match in re.findall(pattern, code))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread; matrix instructions and loads of what was spilled for want of
    registers, both in the innermost loop."""
    tool = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
        code = subprocess.check_output([tool, "-sass", file.name], text=True)
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    jumps = [(at, re.search(r"BRA.* 0x([0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    bodies = [[text for at, text in lines if a <= at <= b] for a, b in loops]
    found = {"registers": int(re.findall(r"REG:(\d+)", usage)[-1]), "matrix": 0, "spilled": 0}
    for body in sorted(bodies, key=len, reverse=True):  # the shortest with products stays
        if matrix := sum("MMA." in text for text in body):
            found |= {"matrix": matrix, "spilled": sum("LDL" in text for text in body)}
    return found


def compile_layer(
    backend: Contraction,
    channels: tuple[int, int],
    kernel: int,
    size: int,
    cells: int | None = None,
    batch: int = 1,
) -> None:
    """Both passes of one layer in bfloat16.

    Args:
        backend: whose kernels.
        channels: read, written.
        kernel: its size on both axes.
        size: of the input on both axes.
        cells: number in the warehouse; by default those of the layer alone.
        batch: number of samples.
    """
    inner, out = channels
    width = min(channels)  # as when layers share a warehouse: the channels that all have
    warehouse = partition_kernels(
        [KernelShape(out, inner, (kernel, kernel)), KernelShape(width, width, (kernel, kernel))]
    )
    spec = ConvSpec(warehouse.layers[0], (1, 1), (kernel // 2, kernel // 2), (1, 1))
    cells = cells or spec.partition.mixtures
    dtype = torch.bfloat16
    x = torch.empty(batch, inner, size, size, dtype=dtype)
    if kernel > 1:
        x = x.contiguous(memory_format=torch.channels_last)
    alpha = torch.empty(batch, spec.partition.mixtures, cells)
    columns = torch.empty(cells, width * width, dtype=dtype)
    y = backend.forward(x, alpha, columns, spec)
    needs = (True, True, True) if isinstance(backend, TritonConv) else (True, False, False)
    backend.backward(torch.empty_like(y), x, alpha, columns, spec, needs)


def main() -> None:
    driver.set_active(Hopper())
    found: list[dict[str, Any]] = []
    for module, name in (
        (triton_kernels, "convolve"),
        (triton_kernels, "convolve_flat"),
        (triton_kernels, "kernel_gradient"),
        (triton_kernels, "kernel_gradient_flat"),
        (triton_on_chip_kernel, "convolve_on_chip"),
    ):
        setattr(module, name, Compiled(getattr(module, name), found))
    for name in ("tiles_of_convolution", "tiles_of_gradient"):  # as for 128 samples
        rule = getattr(triton_launch, name)
        setattr(triton_launch, name, lambda b, *s, rule=rule: rule(128 * b, *s))
    compile_layer(TritonConv(), (128, 128), 3, 28)
    compile_layer(TritonConv(), (128, 128), 1, 28)
    # The last stages of ResNet18 1x and 4x and of ResNet50 1x.
    usable = _triton() >= _TRITON
    for channels, kernel, cells in usable * (
        ((512, 512), 3, 27),
        ((512, 512), 3, 108),
        ((2048, 512), 1, 47),
    ):
        compile_layer(TritonOnChip(), channels, kernel, 7, cells, batch=16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
