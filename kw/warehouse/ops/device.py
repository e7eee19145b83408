"""What a device can do, as far as the cost model needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .contraction import Cost

__all__ = ["GPUS", "DeviceProfile", "device_profile"]


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of one device.

    Attributes:
        dense: multiply-adds a second in matrix products, by dtype.
        slow: multiply-adds a second outside of them.
        bandwidth: bytes a second.
        launch: seconds a call.
    """

    dense: dict[torch.dtype, float]
    slow: float
    bandwidth: float
    launch: float

    def seconds(self, cost: Cost, dtype: torch.dtype, efficiency: float = 1.0) -> float:
        """Predicted time: arithmetic or memory, whichever takes longer, memory that is waited for,
        and the calls.

        Args:
            cost: of a back end.
            dtype: in which it computes.
            efficiency: share of the dense rate that it reaches.
        """
        dense = self.dense.get(dtype, self.dense[torch.float32]) * efficiency
        arithmetic = cost.dense_macs / dense + cost.slow_macs / self.slow
        overlapped = max(arithmetic, cost.bytes / self.bandwidth)
        return overlapped + cost.waiting_bytes / self.bandwidth + cost.launches * self.launch


def device_profile(device: str) -> DeviceProfile:
    """The profile of a device type: of the current CUDA device, of the CPU's threads in use."""
    if device == "cuda" and torch.cuda.is_available():
        high = torch.get_float32_matmul_precision() != "highest"
        return _cuda_profile(torch.cuda.current_device(), high)
    return _cpu_profile(torch.get_num_threads())


@cache
def _cpu_profile(threads: int) -> DeviceProfile:
    # Seen with oneDNN on AVX-512 cores: 75 to 90 G multiply-adds a second and core in float32,
    # 25 to 50 GB/s from memory for two of them, about 8 us for a call through the dispatcher.
    float32 = 75e9 * threads
    dense = {torch.float32: float32, torch.float64: float32 / 2}
    dense |= {torch.bfloat16: float32 / 2, torch.float16: float32 / 4}
    return DeviceProfile(dense, slow=4e9 * threads, bandwidth=30e9, launch=8e-6)


# Multiply-adds a clock and multiprocessor in 16 bit on the tensor cores (vendor's data sheets).
_TENSOR_MACS = {(7, 0): 512, (7, 5): 512, (8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048}


@cache
def _cuda_profile(index: int, reduced_float32: bool) -> DeviceProfile:
    properties = torch.cuda.get_device_properties(index)
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3  # kHz
    # A compute capability that is not known yet is taken for the newest that is.
    tensor = _TENSOR_MACS.get((properties.major, properties.minor), max(_TENSOR_MACS.values()))
    memory_clock = getattr(properties, "memory_clock_rate", 0) * 1e3
    bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
    bandwidth = 2 * memory_clock * bus_bytes or 2e12
    per_clock = properties.multi_processor_count * clock
    return _gpu_profile(per_clock, tensor, bandwidth, reduced_float32)


def _gpu_profile(
    per_clock: float, tensor: int, bandwidth: float, reduced_float32: bool
) -> DeviceProfile:
    """From multiprocessors times clock, their multiply-adds on tensor cores, and memory's peak."""
    half = 0.6 * per_clock * tensor  # what large matrix products reach of the peak
    single = half / 2 if reduced_float32 else 0.7 * per_clock * 128
    dense = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
    dense[torch.float64] = per_clock * 32
    return DeviceProfile(dense, slow=0.3 * per_clock * 128, bandwidth=0.8 * bandwidth, launch=4e-6)


GPUS = {
    "a100": _gpu_profile(108 * 1.41e9, 1024, 2.04e12, False),
    "h100": _gpu_profile(132 * 1.98e9, 2048, 3.35e12, False),
    "h200": _gpu_profile(132 * 1.98e9, 2048, 4.8e12, False),
}
"""Profiles of GPUs that are not there, from data sheets, to say what would be chosen on them."""
