"""Kernels that are compiled for a GPU are tried there before their first use.

Such a kernel is compiled on a user's machine for a device, a driver and a compiler that its authors
may never have seen. A trial compiles and launches it on random operands of real shapes, waits for
the device and compares the results with a library's. Where it fails, the kernel is banned for such
operands, the reason is logged once, and the library takes its place.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import one_line
from .device import is_capturing
from .precision import allows_tf32

log = logging.getLogger(__name__)
T = TypeVar("T")

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TF32 = 1e-2
_ATTEMPTS = 3
_lock = threading.Lock()


class DeviceLostError(RuntimeError):
    """A kernel left the device unusable for this process."""


class Trials:
    """Outcomes of trials, by kind of operands."""

    def __init__(self) -> None:
        self._bans: dict[Hashable, str] = {}
        self._admitted: set[Hashable] = set()
        self._logged: set[tuple[str, str]] = set()
        self._without_memory: Counter[Hashable] = Counter()

    def ban(self, kind: Hashable) -> str | None:
        """Why a trial has banned such operands; ``None`` if none has."""
        return self._bans.get(kind)

    def admits(
        self,
        kind: Hashable,
        device: str,
        trial: Callable[[], str | None],
        name: str,
        about: Callable[[], str],
    ) -> bool | None:
        """Whether a kernel may be used, tried now if it has to be.

        Args:
            kind: of operands, the device among them; the kernel is tried once for each.
            device: type of device.
            trial: gives the reason not to use the kernel, or ``None``.
            name: of the kernel, for messages.
            about: the operands in words.

        Returns:
            ``None`` where it cannot be tried at this moment: during the capture of a CUDA graph, or
            without memory for the trial (which counts as failed the third time).

        Raises:
            DeviceLostError: the trial left the device unusable.
        """
        if kind in self._admitted:
            return True
        if kind in self._bans:
            return False
        if is_capturing(device):
            return None
        try:
            reason = _tried(trial)
        except torch.OutOfMemoryError:
            self._without_memory[kind] += 1
            if self._without_memory[kind] < _ATTEMPTS:
                return None
            reason = f"there was no memory for its trial, {_ATTEMPTS} times"
        except DeviceLostError:
            raise
        except Exception as error:  # what a compiler, a driver or a library raises
            reason = one_line(error)
        if reason is None:
            self._admitted.add(kind)
            return True
        self._bans[kind] = reason
        if (name, reason) not in self._logged:
            self._logged.add((name, reason))
            log.warning(
                "%s is not used for %s: %s. Another implementation takes its place; "
                "`kw doctor` tells more",
                name, about(), reason,
            )  # fmt: skip
        return False


def _tried(trial: Callable[[], T]) -> T:
    """A trial's result. Processes that share Triton's cache and compile at once find files
    missing now and then (https://github.com/triton-lang/triton/issues/11512)."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(OSError):
            return trial()
    return trial()


def attempt(run: Callable[[], T], device: str, name: str, remedy: str) -> T:
    """Run a kernel with memory full of NaN, and wait for the device.

    Args:
        run: launches it.
        device: type of device.
        name: of the kernel and its operands, for messages.
        remedy: how to start again without it.

    Raises:
        DeviceLostError: the device cannot be used any more.
        Exception: what a compiler, a driver or a library raises.
    """
    error: Exception | None = None
    with _poisoned_memory():
        try:
            result = run()
        except Exception as failure:
            error = failure
    try:
        _synchronise(device)
    except RuntimeError as lost:
        raise DeviceLostError(
            f"{name} left the device unusable for this process: {one_line(lost)}. Start again "
            f"without it: {remedy}; please report it with what `kw doctor --json FILE` writes"
        ) from (error or lost)
    if error is not None:
        raise error
    return result


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


def fault(deviations: dict[str, float], limit: float) -> str | None:
    """The last of the deviations beyond a limit, in words."""
    beyond = {name: away for name, away in deviations.items() if away > limit}
    if not beyond:
        return None
    name, away = beyond.popitem()
    return f"{name} is off by {away:.0e} of the largest value"


def _synchronise(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, so that values that a kernel does not write show; in one thread at a
    time, since the settings are the process's."""
    memory: Any = torch.utils.deterministic  # its setting is a property of the module
    with _lock, warnings.catch_warnings():
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        fill = memory.fill_uninitialized_memory
        warnings.simplefilter("ignore")  # of operators that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
