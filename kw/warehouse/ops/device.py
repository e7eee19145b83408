"""What a device can do, as far as the cost model needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from .contraction import Cost
from .precision import allows_tf32

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of one device, estimated or measured.

    Attributes:
        dense: multiply-adds a second in matrix products, by dtype.
        tf32: the same in float32 where products may be rounded (:func:`.precision.allows_tf32`).
        slow: multiply-adds a second outside of them.
        bandwidth: bytes a second.
        launch: seconds a call.
        factors: measured over predicted time, forward and backward, of back ends that were
            measured.
        bans: reason not to use a back end with a dtype, by ``"name dtype"``.
        origin: where the rates come from, for a person.
    """

    dense: Mapping[torch.dtype, float]
    slow: float
    bandwidth: float
    launch: float
    tf32: float = 0.0
    factors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bans: Mapping[str, str] = field(default_factory=dict)
    origin: str = "estimated"

    def seconds(self, cost: Cost, dtype: torch.dtype, efficiency: float = 1.0) -> float:
        """Predicted time: arithmetic or memory, whichever takes longer, memory that is waited for,
        and the calls.

        Args:
            cost: of a back end.
            dtype: in which it computes.
            efficiency: share of the dense rate that it reaches.
        """
        dense = self.dense.get(dtype, self.dense[torch.float32])
        if dtype == torch.float32 and self.tf32 and allows_tf32("cuda"):
            dense = self.tf32
        arithmetic = cost.dense_macs / (dense * efficiency) + cost.slow_macs / self.slow
        overlapped = max(arithmetic, cost.bytes / self.bandwidth)
        return overlapped + cost.waiting_bytes / self.bandwidth + cost.launches * self.launch

    def to_json(self) -> dict[str, Any]:
        """Numbers and texts that :meth:`from_json` reads."""
        return {
            "multiply_adds_a_second": {type_name(t): rate for t, rate in self.dense.items()},
            "tf32": self.tf32,
            "outside_of_products": self.slow,
            "bytes_a_second": self.bandwidth,
            "seconds_a_call": self.launch,
            "measured_over_predicted": {name: list(two) for name, two in self.factors.items()},
            "bans": dict(self.bans),
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> DeviceProfile:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: something is missing or of another type.
        """
        try:
            rates = found["multiply_adds_a_second"]
            return cls(
                {t: float(rates[type_name(t)]) for t in _DTYPES if type_name(t) in rates},
                float(found["outside_of_products"]),
                float(found["bytes_a_second"]),
                float(found["seconds_a_call"]),
                float(found["tf32"]),
                {n: (float(a), float(b)) for n, (a, b) in found["measured_over_predicted"].items()},
                {str(name): str(reason) for name, reason in found["bans"].items()},
                str(found["origin"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the rates of a device: {error!r}") from error


def type_name(dtype: torch.dtype) -> str:
    """As a configuration names it: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def estimated_profile(device: str) -> DeviceProfile:
    """By rule: of the current CUDA device, or of the CPU's threads in use."""
    if device == "cuda" and torch.cuda.is_available():
        return _cuda_profile(torch.cuda.current_device())
    return _cpu_profile(torch.get_num_threads())


@cache
def _cuda_profile(index: int) -> DeviceProfile:
    from .gpus import gpu_of

    return gpu_of(torch.cuda.get_device_properties(index)).profile()


@cache
def _cpu_profile(threads: int) -> DeviceProfile:
    # Seen with oneDNN on AVX-512 cores: 75 to 90 G multiply-adds a second and core in float32,
    # 25 to 50 GB/s from memory for two of them, about 8 us for a call through the dispatcher.
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    float32 = (75e9 if wide else 40e9) * threads
    dense = {torch.float32: float32, torch.float64: float32 / 2}
    dense |= {dtype: float32 * _half_share(dtype, wide) for dtype in _HALVES}
    return DeviceProfile(dense, slow=4e9 * threads, bandwidth=30e9, launch=8e-6)


_HALVES = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
"""Instructions for products of a type: of tiles, of vectors."""


def _half_share(dtype: torch.dtype, wide: bool) -> float:
    """Rate of a CPU's products of a type against float32's, by its instructions."""
    found: Any = getattr(torch.cpu, "get_capabilities", dict)  # torch >= 2.10
    capabilities = found()
    tiles, vectors = _HALVES[dtype]
    if capabilities.get(tiles):
        return 4  # of 16 by the instruction's width: oneDNN packs the operands first
    if capabilities.get(vectors):
        return 2
    # Without them oneDNN converts to float32 and back on AVX-512 alone; others compute one value
    # at a time: 0.4 to 0.8 G multiply-adds a second against 38 to 49 in float32 (two AVX2 cores).
    return (0.5 if dtype == torch.bfloat16 else 0.25) if wide else 1 / 60


def current_gpu(device: str) -> int:
    """The current device's index; 0 for a type of which there is none here."""
    return torch.cuda.current_device() if device == "cuda" and torch.cuda.is_available() else 0


def is_capturing(device: str) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then."""
    if device != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()
