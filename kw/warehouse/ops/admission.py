"""A back end that compiles kernels for a GPU is tried there before its first use.

Such a kernel is compiled on a user's machine for a device, a driver and a compiler that its authors
may never have seen. The trial compiles and launches it on random operands of the real shapes, waits
for the device and compares a few samples with a library back end. Where it fails, the back end is
banned for problems of that kind, the reason is logged once, and the next back end takes its place.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import one_line
from .contraction import Contraction, Problem
from .device import current_gpu, is_capturing
from .precision import allows_tf32
from .timing import draw_operands

__all__ = [
    "Admission",
    "DeviceLostError",
    "bucket",
    "deviations",
    "difference",
    "tolerance",
]

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TF32 = 1e-2
_ATTEMPTS = 3
OUTPUT = "output"
GRADIENTS = ("gradient of the input", "gradient of the coefficients", "gradient of the cells")


class DeviceLostError(RuntimeError):
    """A kernel left the device unusable for this process."""


class Admission:
    """Outcomes of trials, by back end, kind of problem and device.

    Problems of one kind differ in the number of samples and the size of the input by less than a
    factor of two; kernels and their tiles hardly depend on more.

    Args:
        library: the back end to compare with.
    """

    def __init__(self, library: Contraction) -> None:
        self._library = library
        self._bans: dict[tuple[str, Problem, int], str] = {}
        self._admitted: set[tuple[str, Problem, int]] = set()
        self._logged: set[tuple[str, str]] = set()
        self._without_memory: Counter[tuple[str, Problem, int]] = Counter()

    def ban(self, contraction: Contraction, problem: Problem) -> str | None:
        """Why a trial has banned the back end for such problems; ``None`` if none has."""
        return self._bans.get(_kind(contraction, problem))

    def admits(self, contraction: Contraction, problem: Problem) -> bool | None:
        """Whether the back end may be used, tried now if it has to be.

        Returns:
            ``None`` where it cannot be tried at this moment: during the capture of a CUDA graph, or
            without memory for the trial (which counts as failed the third time).

        Raises:
            DeviceLostError: the trial left the device unusable.
        """
        if not contraction.needs_trial(problem):
            return True
        kind = _kind(contraction, problem)
        if kind in self._admitted:
            return True
        if kind in self._bans:
            return False
        if is_capturing(problem.device):
            return None
        try:
            reason = _try(contraction, self._library, problem)
        except torch.OutOfMemoryError:
            self._without_memory[kind] += 1
            if self._without_memory[kind] < _ATTEMPTS:
                return None
            reason = f"there was no memory for its trial, {_ATTEMPTS} times"
        if reason is None:
            self._admitted.add(kind)
            return True
        self._bans[kind] = reason
        if (contraction.name, reason) not in self._logged:
            self._logged.add((contraction.name, reason))
            log.warning(
                "back end %r is not used for %s: %s. Another one takes its place; `kw doctor` "
                "tells more",
                contraction.name, _describe(problem), reason,
            )  # fmt: skip
        return False

    def clear(self) -> None:
        """Forget all outcomes."""
        self._bans.clear()
        self._admitted.clear()
        self._logged.clear()
        self._without_memory.clear()


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest expected value; infinite where a
    found value is no number."""
    worst = (found.double() - expected.double()).abs().max()
    largest = expected.double().abs().max()
    relative = float(worst / largest) if largest > 0 else float(worst)
    return relative if math.isfinite(relative) else math.inf


def tolerance(dtype: torch.dtype, device: str) -> float:
    """Difference that rounding explains in a type under torch's present settings."""
    if dtype == torch.float32 and allows_tf32(device):
        return _TF32
    return _TOLERANCE[dtype]


def deviations(
    contraction: Contraction, library: Contraction, problem: Problem, exact: torch.dtype
) -> dict[str, float]:
    """Run a back end on random operands and compare a few samples with the library's results.

    Args:
        contraction: back end to try.
        library: back end to compare with.
        problem: shapes, types, device and pass.
        exact: type in which the library computes.

    Returns:
        For the output, or for every gradient, the largest difference relative to the largest value;
        infinite for what was not written.

    Raises:
        DeviceLostError: the device cannot be used any more.
        Exception: what a compiler, a driver or a library raises.
    """
    operands = draw_operands(problem)
    samples = sorted({0, problem.batch // 2, problem.batch - 1})
    others = [i for i in range(problem.batch) if i not in samples]
    operands.grad[others] = 0  # the compared samples alone make the cells' gradient
    error: Exception | None = None
    with _poisoned_memory():
        try:
            found = operands.run(contraction)
        except Exception as failure:
            error = failure
    try:
        _synchronise(problem.device)
    except RuntimeError as lost:
        raise DeviceLostError(
            f"back end {contraction.name!r} left the device unusable for this process, for "
            f"{_describe(problem)}: {one_line(lost)}. Start again without it: "
            f"--cfg-options contraction.planner=off, or kw.set_backend(model, "
            f"{library.name!r}); please report it with what `kw doctor --json FILE` writes"
        ) from (error or lost)
    if error is not None:
        raise error
    few = operands.of_samples(samples).to(exact)
    names = GRADIENTS if problem.training else (OUTPUT,)
    return {
        name: difference(ours if name == GRADIENTS[-1] else ours[samples], theirs)
        for name, ours, theirs in zip(names, found, few.run(library), strict=True)
    }


def _try(contraction: Contraction, library: Contraction, problem: Problem) -> str | None:
    """Reason not to use the back end; ``None`` if it computes what the library computes."""
    exact = torch.promote_types(problem.dtype, torch.float32)
    try:
        found = deviations(contraction, library, problem, exact)
    except (torch.OutOfMemoryError, DeviceLostError):
        raise
    except Exception as error:
        return one_line(error)
    for name, away in found.items():
        if away > tolerance(problem.dtype, problem.device):
            return f"{name} is off by {away:.0e} of the largest value"
    return None


def _kind(contraction: Contraction, problem: Problem) -> tuple[str, Problem, int]:
    size = tuple(map(bucket, problem.size))
    like = replace(problem, batch=bucket(problem.batch), size=size)
    return contraction.name, like, current_gpu(problem.device)


def _describe(problem: Problem) -> str:
    spec = problem.spec
    kernel = "x".join(map(str, spec.partition.kernel))
    size = "x".join(map(str, problem.size))
    phase = "backward" if problem.training else "forward"
    dtype = str(problem.dtype).removeprefix("torch.")
    return (
        f"{spec.in_channels}->{spec.out_channels} channels, kernel {kernel}, {size} positions, "
        f"{problem.cells} cells, batch {problem.batch}, {dtype}, {phase}"
    )


def _synchronise(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, so that values that a kernel does not write show."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its setting is a property of the module
    fill = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
