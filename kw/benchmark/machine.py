"""Machine, versions and commit of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..warehouse.ops.precision import matmul_precision
from .conditions import device_slug

ROOT = Path(__file__).parents[2]
_VARIABLES = (
    "GLIBC_TUNABLES",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "MALLOC_CONF",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "THP_MEM_ALLOC_ENABLE",
)


def describe_machine(device: str) -> dict[str, Any]:
    """The device's name in file names, processor, cores that this process may use, and the GPU."""
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo") or "")
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    machine: dict[str, Any] = {
        "device": device_slug(device),
        "cpu": found[1].strip() if found else platform.processor() or platform.machine(),
        "cores": cores,
        "capability": torch.backends.cpu.get_cpu_capability(),
        # Each pass allocates and frees large tensors; depending on the allocator's settings, page
        # faults can take as long as the arithmetic.
        "environment": {key: value for key, value in os.environ.items() if key in _VARIABLES},
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine["gpu"] = properties.name
        machine["gpu_memory"] = properties.total_memory
    return machine


def describe_versions(device: str) -> dict[str, str | None]:
    """Of Python and what computes, and the precision of float32 products."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found: dict[str, str | None] = {**versions, "timm": _version("timm")}
    found["triton"] = _version("triton")
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    found["float32_matmul_precision"] = matmul_precision()
    return found


def describe_code() -> dict[str, Any]:
    """The commit, and whether code or configurations differ from it; nulls outside of a
    checkout."""
    commit = _git("describe", "--always", "--tags")
    changed = _git("status", "--porcelain", "--", "kw", "tools", "configs")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _read(path: str) -> str | None:
    return Path(path).read_text().strip() if Path(path).is_file() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists():  # installed; git would answer for a repository around it
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
