"""What Triton makes of the kernels for a Hopper GPU; compiling does not need one.

Whether a compiler sees that addresses are consecutive decides how fast a kernel is, changes with
its version, and shows in no result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SHARED = 227 << 10
"""Bytes of shared memory that a program may have on a Hopper GPU; the multiprocessor has one KB
more, and each program takes one."""


def can_compile() -> bool:
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    from triton.backends import backends  # a build without the NVIDIA one cannot

    return "nvidia" in backends


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ``compile_kernels.py`` found, by kernel, in the order of its layers."""
    if not can_compile():
        pytest.skip("needs Triton's compiler for NVIDIA GPUs")
    script = Path(__file__).parents[1] / "scripts/compile_kernels.py"
    folder = tmp_path_factory.mktemp("cache")
    cache, report = str(folder), folder / "found.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, "--few", "--targets", "sm_90", "--json", report],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, list[dict]] = {}
    for kernel in json.loads(report.read_text())["sm_90"]:
        found.setdefault(kernel["kernel"], []).append(kernel)
    return found


def test_kernels_load_whole_vectors_and_use_the_matrix_units(compiled):
    found = compiled["convolve"] + compiled["kernel_gradient"]
    assert len(found) == 6
    for kernel in found:
        assert kernel["products"] > 0, kernel
        assert kernel["copies"] == [16], kernel
        assert kernel["plain loads"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel


def test_kernels_stay_on_chip(compiled):
    """Everything that is predicted of the on-chip kernel rests on this."""
    found = compiled.get("convolve_on_chip")
    if found is None:
        pytest.skip("refused with this Triton")
    few, many, some = found[:2], found[2:4], found[4:]  # cells: 27, 108, 47
    assert len(some) == 2
    for kernel in found:
        assert kernel["batched products"] > 0, kernel
        assert 16 in kernel["copies"], kernel  # the input's
        assert kernel["registers"] <= 255, kernel
        for phases, *sides in kernel["layouts"]:
            # Rows of a sample follow each other and are swizzled: their reads do not conflict.
            assert phases > 1, kernel
            assert sides[-1] == 0, kernel
    for kernel in many:
        assert kernel["shared"] <= SHARED, kernel
    for kernel in few + some:  # two programs fit on a multiprocessor, with what each takes beside
        assert 2 * (kernel["shared"] + 1024) <= SHARED + 1024, kernel
        assert 2 * kernel["threads"] * kernel["registers"] <= 1 << 16, kernel
    for kernel in few + some[:1]:  # the loop's products are some times what it reloads
        assert kernel["spilled"] * 2 <= kernel["matrix"], kernel
