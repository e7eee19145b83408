"""Every back end examined on this machine: errors against float64, times, rates of the device."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import one_line
from ..warehouse import KernelShape, partition_kernels
from ..warehouse.ops import CONTRACTIONS, ConvSpec, Problem, coefficients, selector
from ..warehouse.ops.admission import deviations
from ..warehouse.ops.compiled import CompileError, compiler
from ..warehouse.ops.contraction import Contraction
from ..warehouse.ops.device import DeviceProfile, estimated_profile
from ..warehouse.ops.precision import as_convolutions_round
from ..warehouse.ops.timing import draw_operands
from ..warehouse.ops.trials import DeviceLostError, fault, tolerance
from .timing import between, now

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
SHAPES = (
    # in, out, kernel, stride, groups, size, share of the layer's cells
    (64, 64, 3, 1, 1, 56, 1),
    (512, 512, 3, 1, 1, 7, 1),
    (1024, 256, 1, 1, 1, 14, 1),
    (256, 256, 3, 1, 1, 14, 4),
    (192, 192, 3, 1, 192, 28, 1),
    (128, 256, 3, 2, 1, 28, 1),
    (64, 256, 1, 1, 1, 56, 1),
    (512, 512, 3, 1, 1, 7, 0.25),
    (128, 128, 3, 1, 1, 28, 1),
    (24, 144, 1, 1, 1, 56, 1),
    (384, 384, 7, 1, 384, 14, 1),
    (512, 2048, 1, 1, 1, 7, 4),
)
"""Layers of the papers' models, the most telling first, since time may run out."""
BATCH = {"cpu": 2, "cuda": 64}
_SLOW = 10
"""A type whose products are slower than float32's by more is examined on layers of an eighth of the
channels, and not timed."""
_NARROWED = 8


@dataclass(frozen=True)
class Finding:
    """One back end on one problem."""

    backend: str
    shape: str  # the layer, in words
    dtype: str
    backward: bool  # whether the backward pass was run
    deviations: dict[str, float]  # from float64, relative to the largest value, by result
    seconds: float | None = None  # of one call; None where it was not timed
    predicted: float | None = None  # seconds from the rates of the device
    failure: str | None = None  # what went wrong, or None
    refusal: str | None = None  # reason the back end does not do this, or None

    def to_json(self) -> dict[str, Any]:
        """Plain values; a deviation that is no number is null."""
        deviations = {n: v if math.isfinite(v) else None for n, v in self.deviations.items()}
        return {**asdict(self), "deviations": deviations}


def describe_tools(device: str) -> dict[str, str]:
    """What compiles kernels here, and the limits of the device that matter to them."""
    found: dict[str, str] = {}
    try:
        found["C++ compiler"] = " ".join(compiler())
    except CompileError as error:
        found["C++ compiler"] = f"missing: {error}"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        shared = getattr(properties, "shared_memory_per_block_optin", None)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["shared memory"] = f"{shared >> 10} KB a block" if shared else "not told by torch"
        c_compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        found["C compiler"] = c_compiler or "missing: Triton needs one"
        try:
            from triton.backends.nvidia.compiler import get_ptxas

            found["ptxas"] = str(get_ptxas(properties.major * 10 + properties.minor))
        except Exception as error:  # no Triton, another vendor's, or another version
            found["ptxas"] = f"unknown: {one_line(error)}"
    return found


def measure_rates(device: str) -> DeviceProfile:
    """Rates of products, memory and calls; those outside of products in proportion to float32's."""
    estimate = estimated_profile(device)
    large, copied = (768, 32 << 20) if device == "cpu" else (4096, 256 << 20)

    def product(dtype: torch.dtype, side: int = large) -> float:
        a = torch.randn(side, side, device=device).to(dtype)
        return side**3 / _seconds(lambda: a @ a, device)

    dense = {torch.float32: product(torch.float32)}
    scale = dense[torch.float32] / estimate.dense[torch.float32]
    for dtype in estimate.dense:
        is_slow = device == "cpu" and _is_slow(dtype, estimate)  # the large one takes a minute
        dense[dtype] = product(dtype, large // 3 if is_slow else large)
    tf32 = 0.0
    if device == "cuda":
        x = torch.empty(1, device=device)
        with as_convolutions_round(x):
            tf32 = product(torch.float32)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / _seconds(lambda: target.copy_(source), device)
    one = torch.ones(1, device=device)
    begin = time.perf_counter()
    for _ in range(1000):
        torch.add(one, one)
    launch = (time.perf_counter() - begin) / 1000
    return DeviceProfile(
        dense, estimate.slow * scale, bandwidth, launch, tf32, origin="measured by kw doctor"
    )


def problems(device: str, rates: DeviceProfile) -> Iterator[tuple[str, Problem]]:
    """Both passes of every shape in every type, with a description of the shape."""
    for inner, out, side, stride, groups, size, share in SHAPES:
        for dtype in DTYPES[device]:
            by = _NARROWED if _is_slow(dtype, rates) else 1
            part = (max(groups // by, 1), inner // by, out // by)
            shape = KernelShape(part[2], part[1], (side, side), part[0])
            warehouse = partition_kernels([shape], cell_num_ratio=share)
            spec = ConvSpec(
                warehouse.layers[0], (stride, stride), (side // 2, side // 2), (1, 1), part[0]
            )
            words = f"{inner}->{out} {side}x{side} @{size}"
            words += f" stride {stride}" if stride > 1 else ""
            words += f" groups {groups}" if groups > 1 else ""
            words += f" share {share:g}" if share != 1 else ""
            for training in (False, True):
                yield words, Problem(
                    spec, warehouse.cells, BATCH[device], (size, size), dtype, device, training,
                    device == "cuda",
                )  # fmt: skip


def _is_slow(dtype: torch.dtype, rates: DeviceProfile) -> bool:
    return rates.dense[dtype] < rates.dense[torch.float32] / _SLOW


def examine(device: str, rates: DeviceProfile, seconds: float) -> Iterator[Finding]:
    """Every back end on every problem, until so many seconds have passed.

    Raises:
        DeviceLostError: a back end left the device unusable.
    """
    begin = time.perf_counter()
    for shape, problem in problems(device, rates):
        if time.perf_counter() - begin > seconds:
            return
        predicted: dict[str, float | None] = {}
        if not _is_slow(problem.dtype, rates):
            # Those that wait for a measurement get one.
            plain = replace(rates, factors=dict.fromkeys(CONTRACTIONS, (1.0, 1.0)))
            predicted = {each.name: each.seconds for each in selector.predict(problem, plain)}
        dtype = str(problem.dtype).removeprefix("torch.")
        for name, contraction in CONTRACTIONS.items():
            finding = Finding(
                name, shape, dtype, problem.training, {}, predicted=predicted.get(name)
            )
            if refusal := contraction.refusal(problem):
                yield replace(finding, refusal=refusal)
            else:
                yield _examine_one(finding, contraction, problem)


def examine_attention(device: str) -> str:
    """How far the kernel of attention coefficients is from float64, or why it is not used.

    Raises:
        DeviceLostError: it left the device unusable.
    """
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        try:
            found = coefficients.deviations(5, 27, True, dtype, device)
        except DeviceLostError:
            raise
        except Exception as error:  # what a compiler, a driver or a library raises
            said.append(f"{name} FAILS: {one_line(error)}")
            continue
        wrong = fault(found, tolerance(dtype, "cpu"))
        said.append(f"{name} WRONG: {wrong}" if wrong else f"{name} {max(found.values()):.0e}")
    return ", ".join(said)


def _examine_one(finding: Finding, contraction: Contraction, problem: Problem) -> Finding:
    try:
        library = CONTRACTIONS[selector.fallback]
        found = deviations(contraction, library, problem, torch.float64)
        took = None
        if finding.predicted is not None:
            operands = draw_operands(problem)
            took = _seconds(lambda: operands.run(contraction), problem.device)
    except DeviceLostError:
        raise
    except torch.OutOfMemoryError:
        return replace(finding, refusal="there is not enough memory")
    except Exception as error:  # what a compiler, a driver or a library raises
        return replace(finding, failure=one_line(error))
    failure = fault(found, tolerance(problem.dtype, problem.device))
    return replace(finding, deviations=found, seconds=took, failure=failure)


def calibrated(rates: DeviceProfile, findings: list[Finding]) -> DeviceProfile:
    """The rates with what the findings say of each back end: times over predictions, and bans."""
    factors: dict[str, tuple[float, float]] = {}
    for name in CONTRACTIONS:
        passes = [
            [
                f.seconds / f.predicted
                for f in findings
                if f.backend == name and f.backward == backward and f.seconds and f.predicted
            ]
            for backward in (False, True)
        ]
        if all(passes):
            factors[name] = (statistics.median(passes[0]), statistics.median(passes[1]))
    bans: dict[str, str] = {}
    for finding in findings:
        if finding.failure:
            key = f"{finding.backend} {finding.dtype}"
            bans.setdefault(key, f"{finding.shape}: {finding.failure}")
    return replace(rates, factors=factors, bans=bans)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Of one call, the median of some; on a GPU by replaying a graph of it, without the host."""
    run()
    times: list[float] = []
    if device == "cpu":
        begin = time.perf_counter()
        while len(times) < 3 or (len(times) < 20 and time.perf_counter() - begin < 0.03):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    graph = torch.cuda.CUDAGraph()
    repeat: Callable[[], object] = graph.replay
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it waits for the device, which no graph can
        torch.cuda.synchronize()
        repeat = run
    for _ in range(5):
        began = now(on_gpu=True)
        for _ in range(4):
            repeat()
        ended = now(on_gpu=True)
        torch.cuda.synchronize()
        times.append(between(began, ended) / 4)
    return statistics.median(times)
