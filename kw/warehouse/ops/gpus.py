"""GPUs by their data sheets, and what is taken for one that has none here."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch

from .device import DeviceProfile, type_name


@dataclass(frozen=True)
class Gpu:
    """Figures of a GPU's data sheet.

    Attributes:
        units: multiprocessors (NVIDIA) or compute units (AMD).
        clock: hertz, boosted.
        tensor: multiply-adds a clock and unit in 16 bit with sums in float32.
        bandwidth: of its memory, bytes a second.
        capability: NVIDIA's compute capability; ``(0, 0)`` for other vendors.
    """

    units: int
    clock: float
    tensor: int
    bandwidth: float
    capability: tuple[int, int] = (0, 0)

    def profile(self) -> DeviceProfile:
        """What large operations reach of the peaks, by estimate."""
        per_clock = self.units * self.clock
        half = 0.6 * per_clock * self.tensor
        dense = {torch.bfloat16: half, torch.float16: half, torch.float32: 0.7 * per_clock * 128}
        dense[torch.float64] = per_clock * 32
        slow, bandwidth = 0.3 * per_clock * 128, 0.8 * self.bandwidth
        bans: dict[str, str] = {}
        if (0, 0) < self.capability < (8, 0):  # which the back ends find where they are
            kernels = itertools.product(("triton", "triton_depthwise", "on_chip"), dense)
            reason = "needs a device of compute capability 8.0"
            bans = {f"{name} {type_name(dtype)}": reason for name, dtype in kernels}
        return DeviceProfile(dense, slow, bandwidth, launch=4e-6, tf32=half / 2, bans=bans)


GPUS = {
    "t4": Gpu(40, 1.59e9, 512, 0.32e12, (7, 5)),
    "a100": Gpu(108, 1.41e9, 1024, 2.04e12, (8, 0)),
    "a10": Gpu(72, 1.69e9, 512, 0.6e12, (8, 6)),
    "rtx3090": Gpu(82, 1.7e9, 256, 0.936e12, (8, 6)),
    "l4": Gpu(58, 2.04e9, 512, 0.3e12, (8, 9)),
    "rtx4090": Gpu(128, 2.52e9, 256, 1.008e12, (8, 9)),
    "h100": Gpu(132, 1.98e9, 2048, 3.35e12, (9, 0)),
    "h200": Gpu(132, 1.98e9, 2048, 4.8e12, (9, 0)),
    "b200": Gpu(148, 1.97e9, 4096, 8e12, (10, 0)),
    "rtx5090": Gpu(170, 2.41e9, 256, 1.792e12, (12, 0)),
    "mi250x": Gpu(110, 1.7e9, 512, 1.64e12),  # one of its two devices
    "mi300x": Gpu(304, 2.1e9, 1024, 5.3e12),
}
"""GPUs by name, from the vendors' data sheets: to say what would be chosen on them."""

# Multiply-adds a clock and multiprocessor by compute capability; later ones are taken for the last.
_NVIDIA = {(7, 0): 512, (8, 0): 1024, (8, 6): 512, (9, 0): 2048, (10, 0): 4096, (12, 0): 512}
# The same and the memory's bytes a second by architecture: torch does not say enough of AMD's.
_AMD = {"gfx90a": (512, 1.64e12), "gfx942": (1024, 5.3e12), "gfx950": (2048, 8e12)}
_CLOCK = 1.7e9
_BALANCE = 100
"""Multiply-adds of the tensor cores for every byte of memory, where a device does not say: T4 102,
A100 76, L4 202, RTX 4090 82, H100 160, B200 149."""


def gpu_of(properties: Any) -> Gpu:
    """The figures of a device from what torch says of it, by rule where it does not.

    Not every build of torch says clocks and the memory's width, and a device may be newer than this
    file: a rate that is a little wrong costs time, and never results.

    Args:
        properties: of :func:`torch.cuda.get_device_properties`.
    """
    known = _known(properties.name)
    capability = (properties.major, properties.minor)
    clock = getattr(properties, "clock_rate", 0) * 1e3  # kHz
    architecture = str(getattr(properties, "gcnArchName", "")).split(":")[0]
    bandwidth = 2e3 * getattr(properties, "memory_clock_rate", 0)
    bandwidth *= getattr(properties, "memory_bus_width", 0) / 8
    if architecture.startswith("gfx"):
        capability = (0, 0)
        tensor, bandwidth = _AMD.get(architecture, (256, bandwidth))
    else:
        tensor = _NVIDIA[max((each for each in _NVIDIA if each <= capability), default=(7, 0))]
        if "GeForce" in properties.name:  # half of it with sums in float32
            tensor = min(tensor, 256)
    units = properties.multi_processor_count
    if known is not None:
        clock, bandwidth = clock or known.clock, bandwidth or known.bandwidth
    clock = clock or _CLOCK
    return Gpu(units, clock, tensor, bandwidth or units * clock * tensor / _BALANCE, capability)


def _known(name: str) -> Gpu | None:
    """The GPU of :data:`GPUS` with a name such as ``NVIDIA GeForce RTX 4090``."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).replace("rtx ", "rtx").split()
    return next((gpu for known, gpu in GPUS.items() if known in words), None)
