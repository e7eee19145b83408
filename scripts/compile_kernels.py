"""Compile the Triton kernels for GPUs that are not here, and print what became of them.

python scripts/compile_kernels.py --targets sm_80 sm_90 gfx942 --json found.json

By default the layers of all shipped backbones in bfloat16, float16 and float32 (TF32) for every
target: some hours. --few takes the layers that tests/test_triton_compiled.py checks. A line is
printed for every kernel that exceeds a budget: shared memory (LDS), registers (one program has to
fit), reloads of spilled values (half as many as matrix instructions in the innermost loop; on chip
as many), loads of single values (none, unless cells have an odd number of channels). The exit
status is 1 if there is one, or if a kernel does not compile.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kw.cli import ToolParser, output_file, run_tool
from kw.cli.tool import precision, save_json
from kw.evaluation import render_table
from kw.models import PAPER_MODELS
from kw.warehouse import KernelShape, KWLayer, partition_kernels
from kw.warehouse.ops import (
    ConvSpec,
    coefficients,
    triton_coefficients,
    triton_depthwise_kernels,
    triton_kernels,
    triton_launch,
    triton_on_chip_kernel,
)
from kw.warehouse.ops.contraction import Contraction
from kw.warehouse.ops.triton_conv import TritonConv
from kw.warehouse.ops.triton_depthwise import TritonDepthwise
from kw.warehouse.ops.triton_on_chip import _TRITON, TritonOnChip, _triton
from kw.warehouse.ops.triton_tiles import tiles_on_chip
from kw.warehouse.partition import Partition


class Limits(NamedTuple):
    """What a multiprocessor (compute unit) has, by the vendors' guides."""

    shared: int  # KB of shared memory (LDS) that a program may have
    threads: int
    programs: int
    warp: int = 32  # threads

    def programs_of(self, kernel: dict[str, Any]) -> int:
        """Programs that it runs at a time."""
        threads, registers = kernel["threads"], -(-max(kernel["registers"], 1) // 8) * 8
        if self.warp == 64:  # AMD: 512 registers for each lane of four units
            by_registers = 4 * min(512 // registers, 8) // (threads // 64)
            by_shared = (self.shared << 10) // max(kernel["shared"], 1)
        else:
            by_registers = (1 << 16) // (registers * threads)
            own = 0 if self.shared == 64 else 1 << 10  # what a program takes beside
            by_shared = ((self.shared << 10) + own) // max(kernel["shared"] + own, 1)
        return min(by_registers, by_shared, self.threads // threads, self.programs)


TARGETS = {
    "sm_75": Limits(64, 1024, 16),
    "sm_80": Limits(163, 2048, 32),
    "sm_86": Limits(99, 1536, 16),
    "sm_89": Limits(99, 1536, 24),
    "sm_90": Limits(227, 2048, 32),
    "sm_100": Limits(227, 2048, 32),
    "sm_120": Limits(99, 1536, 24),
    "gfx90a": Limits(64, 2048, 32, 64),
    "gfx942": Limits(64, 2048, 32, 64),
}
KERNELS = (
    (triton_kernels, "convolve"),
    (triton_kernels, "convolve_flat"),
    (triton_kernels, "kernel_gradient"),
    (triton_kernels, "kernel_gradient_flat"),
    (triton_on_chip_kernel, "convolve_on_chip"),
    (triton_depthwise_kernels, "depthwise"),
    (triton_depthwise_kernels, "depthwise_gradient"),
    (triton_coefficients, "coefficients"),
    (triton_coefficients, "coefficients_gradient"),
)
BATCH = 128


class Elsewhere:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: str) -> None:
        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target[3:]), 32)
        else:
            self.target = GPUTarget("hip", target, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched; equal launches compile once."""

    def __init__(self, kernel: Any, found: dict[str, dict[str, Any]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            name = self.kernel.fn.__name__
            try:
                binary = self.kernel.run(*args, grid=grid, warmup=True, **options)
            except Exception as error:  # what a compiler raises
                text = " ".join(str(error).split())[-160:] or type(error).__name__
                self.found[f"{name} {options}"] = {"kernel": name, "error": text}
                return
            if binary.hash not in self.found:
                described = describe(binary, options["num_warps"], args[0].itemsize)
                self.found[binary.hash] = {"kernel": name, **described}

        return compile_only


def describe(binary: Any, warps: int, itemsize: int) -> dict[str, Any]:
    """Instructions, registers and memory of what the compiler made; ``itemsize`` of the input."""
    found = {"shared": binary.metadata.shared, "layouts": batched_layouts(binary.asm["ttgir"])}
    single = {2: r"ushort|u?short_\w+|ubyte|d16\w*|b16", 4: r"dword|b32"}[itemsize]
    if "ptx" not in binary.asm:
        code = binary.asm["amdgcn"]
        return found | {
            "threads": 64 * warps,
            "products": code.count("v_mfma_"),
            "single loads": len(re.findall(rf"(global|buffer)_load_({single})\s", code)),
            "registers": max(map(int, re.findall(r"\.vgpr_count: +(\d+)", code)), default=0),
            "spilled": max(map(int, re.findall(r"\.vgpr_spill_count: +(\d+)", code)), default=0),
        }
    ptx = binary.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+),", ptx)
    return found | {
        "threads": 32 * warps,
        "products": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", ptx)),
        "batched products": ptx.count("mma.sync"),
        "copies": sorted({int(size, 16) for size in copies}),
        # Modes of the cache, such as .ca, stand between; a vector would have .v2, .v4 or .v8.
        "single loads": len(re.findall(rf"ld\.global[\w:.]*?(?<!\.v\d)\.b{8 * itemsize}\b", ptx)),
        **resources(binary.asm["cubin"]),
    }


def batched_layouts(code: str) -> list[list[int]]:
    """Of batched operands in shared memory: phases of the swizzle, then sides, nearest first."""
    pattern = r"swizzled_shared<\{.*?maxPhase = (\d+), order = \[(\d), (\d), (\d)\]"
    return sorted([int(n) for n in match] for match in re.findall(pattern, code))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread; matrix instructions and loads of what was spilled for want of
    registers, both in the innermost loop or, where there is none, altogether."""
    tool = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage, code = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    jumps = [(at, re.search(r"BRA.* 0x([0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    loops.append((0, lines[-1][0]))  # short loops are unrolled: all of it counts
    bodies = [[text for at, text in lines if a <= at <= b] for a, b in loops]
    found = {"registers": int(re.findall(r"REG:(\d+)", usage)[-1]), "matrix": 0, "spilled": 0}
    for body in sorted(bodies, key=len, reverse=True):  # the shortest with products stays
        if matrix := sum("MMA." in text for text in body):
            found |= {"matrix": matrix, "spilled": sum("LDL" in text for text in body)}
    return found


def compile_layer(
    backend: Contraction, spec: ConvSpec, cells: int, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Both passes of one layer and of its coefficients for a few samples; tiles are those of
    :data:`BATCH`. Channels last, to which other kernels than pointwise ones bring their input, and
    pointwise ones contiguous."""
    part = spec.partition
    batch = 16 if isinstance(backend, TritonOnChip) else 1
    x = torch.empty(batch, *size, spec.in_channels, dtype=dtype).movedim(-1, 1)
    alpha = torch.empty(batch, part.mixtures, cells)
    cell = part.cell_out * part.cell_in * torch.Size(part.cell_kernel).numel()
    stored = torch.empty(cells, cell, dtype=dtype)
    needs = (True, False, False) if isinstance(backend, TritonOnChip) else (True, True, True)
    for each in (x, x.contiguous()) if spec.is_pointwise else (x,):
        y = backend.forward(each, alpha, stored, spec)
        backend.backward(torch.empty_like(y), each, alpha, stored, spec, needs)
    logits, one_hot = torch.empty(batch, part.mixtures, cells + 1), torch.empty(alpha.shape[1:])
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    made, kept = coefficients.launch(logits, one_hot, torch.empty(()), kind)
    coefficients.launch_gradient(made, logits, kept)


def square(channels: tuple[int, int], kernel: int) -> ConvSpec:
    """A layer whose warehouse it shares with one of the smaller number of channels."""
    inner, out = channels
    width = min(channels)
    warehouse = partition_kernels(
        [KernelShape(out, inner, (kernel, kernel)), KernelShape(width, width, (kernel, kernel))]
    )
    return ConvSpec(warehouse.layers[0], (1, 1), (kernel // 2, kernel // 2), (1, 1))


def few() -> Iterator[tuple[Contraction, ConvSpec, int, tuple[int, ...], torch.dtype]]:
    """Two layers at 28x28, and a depthwise one; one of MobileNetV2 with cells of 8 by 24 channels;
    the last stages of ResNet18 1x and 4x and of ResNet50 1x on chip."""
    for kernel in (3, 1):
        spec = square((128, 128), kernel)
        yield TritonConv(), spec, spec.partition.mixtures, (28, 28), torch.bfloat16
    depthwise = partition_kernels([KernelShape(96, 96, (3, 3), 96)])
    spec = ConvSpec(depthwise.layers[0], (1, 1), (1, 1), (1, 1), 96)
    yield TritonDepthwise(), spec, depthwise.cells, (28, 28), torch.bfloat16
    narrow = Partition((1, 1), (1, 1), 8, 24, (1, 3, 6))
    yield TritonConv(), ConvSpec(narrow, (1, 1), (0, 0), (1, 1)), 18, (56, 56), torch.bfloat16
    if _triton() >= _TRITON:
        for channels, kernel, cells in (
            ((512, 512), 3, 27),
            ((512, 512), 3, 108),
            ((2048, 512), 1, 47),
        ):
            yield TritonOnChip(), square(channels, kernel), cells, (7, 7), torch.bfloat16


def shipped(
    pattern: str, dtypes: list[torch.dtype], on_chip: bool
) -> Iterator[tuple[Contraction, ConvSpec, int, tuple[int, ...], torch.dtype]]:
    """Every ungrouped and every depthwise layer of the shipped models, at 224 pixels."""
    import timm

    import kw

    seen = set()
    for name in kw.list_models(pattern):
        size = 300 if "efficientnet" in PAPER_MODELS[name].backbone else 224
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        layers: list[tuple[ConvSpec, int, tuple[int, ...]]] = []

        def note(layer: Any, inputs: Any, _: Any, layers: Any = layers) -> None:
            x = inputs[0]
            place = tuple(x.shape[2:]) if len(layer.spec.stride) == 2 else (x[0, ..., 0].numel(),)
            layers.append((layer.spec, len(layer.warehouse.cells), place))

        for module in model.modules():
            if isinstance(module, KWLayer):
                module.register_forward_hook(note)
        with torch.no_grad():
            model(torch.empty(1, 3, size, size, device="meta"))
        for layer in dict.fromkeys(layers):
            if layer in seen or (layer[0].groups > 1 and not layer[0].is_depthwise):
                continue
            seen.add(layer)
            backend = TritonDepthwise() if layer[0].is_depthwise else TritonConv()
            for dtype in dtypes:
                yield backend, *layer, dtype
                if on_chip and layer[0].groups == 1 and layer[1] <= 128 and _triton() >= _TRITON:
                    yield TritonOnChip(), *layer, dtype


def fits(target: str, cells: int, dtype: torch.dtype) -> bool:
    """Whether the tiles of the on-chip kernel fit into a GPU's shared memory, as its back end asks
    before it is used."""
    wanted = tiles_on_chip(64, cells, dtype.itemsize).shared(dtype.itemsize)
    return target.startswith("sm_") and wanted <= TARGETS[target].shared << 10


def exceeded(kernel: dict[str, Any], target: str) -> str:
    """The budgets that a kernel exceeds, in words."""
    if "error" in kernel:
        return f"does not compile: {kernel['error']}"
    found, limits = [], TARGETS[target]
    if kernel["shared"] > limits.shared << 10:
        found.append(f"{kernel['shared'] >> 10} KB of shared memory, {limits.shared} are there")
    elif not kernel["programs"]:
        found.append(f"{kernel['threads']} threads of {kernel['registers']} registers do not fit")
    share = 1 if kernel["kernel"] == "convolve_on_chip" else 2
    if share * kernel["spilled"] > kernel.get("matrix", 0):
        found.append(f"{kernel['spilled']} reloads of spilled values")
    if kernel["single loads"] and not kernel["odd"]:
        found.append(f"{kernel['single loads']} loads of single values")
    return "; ".join(found)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--models", default="kw_*", help="pattern of names (default: %(default)s)")
    names = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", type=precision, choices=names, default=names)
    parser.add_argument("--on-chip", action="store_true", help="the on-chip kernel as well")
    parser.add_argument("--few", action="store_true", help="a few layers in bfloat16")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    # As for BATCH samples, though one is enough to compile.
    for name in ("tiles_of_convolution", "tiles_of_gradient"):
        rule = getattr(triton_launch, name)
        setattr(triton_launch, name, lambda b, *s, rule=rule: rule(BATCH * b, *s))
    originals = {name: getattr(module, name) for module, name in KERNELS}
    dtypes = [getattr(torch, name) for name in args.dtypes]
    report: dict[str, list[dict[str, Any]]] = {}
    rows = []
    for target in args.targets:
        driver.set_active(Elsewhere(target))
        setattr(triton_launch, "is_amd", lambda target=target: target.startswith("gfx"))  # noqa: B010
        found: dict[str, dict[str, Any]] = {}
        for module, name in KERNELS:
            originals[name].device_caches.clear()  # they know devices by number alone
            setattr(module, name, Compiled(originals[name], found))
        for layer in few() if args.few else shipped(args.models, dtypes, args.on_chip):
            if isinstance(layer[0], TritonOnChip) and not fits(target, layer[2], layer[4]):
                continue  # the back end refuses it
            before = len(found)
            compile_layer(*layer)
            for kernel in list(found.values())[before:]:
                spec, size, dtype = layer[1], layer[3], str(layer[4]).removeprefix("torch.")
                side = "x".join(map(str, spec.partition.kernel))
                place = "x".join(map(str, size))
                kernel["layer"] = f"{spec.in_channels}->{spec.out_channels} {side} @{place} {dtype}"
                kernel["odd"] = bool(spec.partition.cell_in % 2 or spec.partition.cell_out % 2)
                if spec.is_depthwise:
                    kernel["odd"] = spec.in_channels % 16 > 0
                kernel["odd"] |= kernel["kernel"].startswith("coefficients")  # rows of n + 1
                if "error" not in kernel:
                    kernel["programs"] = TARGETS[target].programs_of(kernel)
                kernel["exceeds"] = exceeded(kernel, target)
                if kernel["exceeds"]:
                    print(target, kernel["kernel"], kernel["layer"], kernel["exceeds"],
                          file=sys.stderr)  # fmt: skip
        if not found:
            parser.error(f"--models: no shipped model matches {args.models!r}")
        report[target] = list(found.values())
        rows.append(row(target, report[target]))
    header = ("target", "kernels", "compile", "most registers", "fewest programs", "spill",
              "load single values", "over budget")  # fmt: skip
    print(render_table(header, rows))
    if args.json is not None:
        save_json(report, args.json)
    sys.exit(any(kernel["exceeds"] for kernels in report.values() for kernel in kernels))


def row(target: str, kernels: list[dict[str, Any]]) -> tuple[str, ...]:
    """A line of the summary; programs are those that a multiprocessor runs at a time."""
    done = [kernel for kernel in kernels if "error" not in kernel]
    counts = (
        len(kernels),
        len(done),
        max((kernel["registers"] for kernel in done), default=0),
        min((kernel["programs"] for kernel in done), default=0),
        sum(bool(kernel["spilled"]) for kernel in done),
        sum(bool(kernel["single loads"]) for kernel in done),
        sum(bool(kernel["exceeds"]) for kernel in kernels),
    )
    return (target, *map(str, counts))


if __name__ == "__main__":
    run_tool(main)
