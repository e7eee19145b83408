"""Timing back ends once per shape, and remembering the result across processes."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .cache import cache_folder, locked
from .contraction import Contraction, Problem
from .layout import laid_out
from .precision import allows_tf32, as_convolutions_round
from .spec import ConvSpec

_ROUNDS = 5


class TimingCache:
    """Times by shape, in one JSON file for a kind of device and the versions of what computes.

    A process that needs a time holds the file's lock while it measures, so that the others wait
    and then choose as it did.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Path, str], dict[str, float]] = {}

    def get(self, problem: Problem, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Seconds by back end; ``measure`` is called where nobody has measured yet."""
        path = cache_folder() / f"timings-{machine_name(problem.device)}-{versions()}.json"
        place = path, _key(problem)
        if place not in self._known:
            self._known[place] = self._from_file(*place, measure)
        return self._known[place]

    def _from_file(
        self, path: Path, key: str, measure: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                times = _read(path)
                if key not in times:
                    times[key] = measure()
                    partial = path.with_suffix(f".{os.getpid()}")
                    partial.write_text(json.dumps(times, indent=1, sort_keys=True))
                    partial.replace(path)
                return times[key]
        except OSError:  # nowhere to write: this process measures for itself
            return measure()


@dataclass(frozen=True)
class Operands:
    """Tensors of one problem, for either pass."""

    x: Tensor
    alpha: Tensor
    cells: Tensor
    grad: Tensor
    spec: ConvSpec
    training: bool

    def run(self, contraction: Contraction) -> tuple[Tensor, ...]:
        """The output or, when training, the gradients of input, coefficients and cells; float32 is
        rounded as in a network."""
        with as_convolutions_round(self.x):
            if not self.training:
                return (contraction.forward(self.x, self.alpha, self.cells, self.spec),)
            x, alpha, cells, needs = self.x, self.alpha, self.cells, (True, True, True)
            found = contraction.backward(self.grad, x, alpha, cells, self.spec, needs)
        return tuple(gradient for gradient in found if gradient is not None)

    def of_samples(self, samples: list[int]) -> Operands:
        """The operands of some samples."""
        x, alpha, grad = (t[samples] for t in (self.x, self.alpha, self.grad))
        return replace(self, x=x, alpha=alpha, grad=grad)

    def to(self, dtype: torch.dtype) -> Operands:
        """The operands in one type."""
        x, alpha, cells, grad = (t.to(dtype) for t in (self.x, self.alpha, self.cells, self.grad))
        return replace(self, x=x, alpha=alpha, cells=cells, grad=grad)


def draw_operands(problem: Problem) -> Operands:
    """Random operands: standard normal, coefficients divided by the root of the number of cells."""
    part, device = problem.spec.partition, problem.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=dtype)

    x = draw(problem.batch, problem.spec.in_channels, *problem.size)
    alpha = draw(problem.batch, part.mixtures, problem.cells, dtype=torch.float32)
    cell = problem.cells_numel // problem.cells
    cells = draw(problem.cells, cell, dtype=problem.cells_dtype or problem.dtype)
    grad = draw(problem.batch, problem.spec.out_channels, *problem.spec.output_size(problem.size))
    x, grad = (laid_out(t, problem.channels_last) for t in (x, grad))
    alpha = (alpha / problem.cells**0.5).to(torch.promote_types(torch.float32, cells.dtype))
    alpha = alpha.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # as fused_coefficients' lie
    return Operands(x, alpha, cells, grad, problem.spec, problem.training)


def time_contraction(contractions: Mapping[str, Contraction], problem: Problem) -> dict[str, float]:
    """Median seconds of one pass by each back end, taken in turn on random tensors.

    One that runs out of memory is left out.
    """
    device = problem.device
    operands = draw_operands(problem)
    times: dict[str, list[float]] = {name: [] for name in contractions}
    for i in range(_ROUNDS + 1):
        for name in list(times):
            try:
                start = _now(device)
                operands.run(contractions[name])
                seconds = _now(device) - start
            except torch.OutOfMemoryError:
                del times[name]
                continue
            if i:  # the first round compiles and warms caches
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine_name(device: str) -> str:
    """Device and version of torch as a part of a file's name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
        name += f"-{torch.get_num_threads()}threads"
    words = "".join(c if c.isalnum() else " " for c in f"{name} torch {torch.__version__}").split()
    return "-".join(words).lower()


@functools.cache
def versions() -> str:
    """Triton's version and this version of the back ends."""
    try:
        triton = importlib.metadata.version("triton").replace(".", "-")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for source in sorted([*folder.glob("*.py"), *folder.glob("cpp/*")]):
        digest.update(source.read_bytes())
    return f"triton-{triton}-{digest.hexdigest()[:12]}"


def _key(problem: Problem) -> str:
    code = "-".join(map(str, problem.spec.encode()))
    size = "x".join(map(str, problem.size))
    phase = "backward" if problem.training else "forward"
    layout = "channels_last" if problem.channels_last else "contiguous"
    types = str(problem.dtype) + (f"/{problem.cells_dtype}" if problem.cells_dtype else "")
    types += " tf32" if problem.dtype == torch.float32 and allows_tf32(problem.device) else ""
    return f"{code} n{problem.cells} b{problem.batch} {size} {types} {layout} {phase}"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path.read_text())
        return {key: {n: float(t) for n, t in times.items()} for key, times in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}
