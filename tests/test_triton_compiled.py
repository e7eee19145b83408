"""What Triton makes of the kernels for a Hopper GPU; compiling does not need one.

Whether a compiler sees that addresses are consecutive decides how fast a kernel is, changes with
its version, and shows in no result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


SCRIPT = Path(__file__).parents[1] / "scripts/compile_kernels.py"


@pytest.fixture(scope="module")
def script():
    if not can_compile():
        pytest.skip("needs Triton's compiler for NVIDIA GPUs")
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ``compile_kernels.py`` found, by kernel, in the order of its layers."""
    if not can_compile():
        pytest.skip("needs Triton's compiler for NVIDIA GPUs")
    folder = tmp_path_factory.mktemp("cache")
    cache, report = str(folder), folder / "found.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--few", "--targets", "sm_90", "--json", report],
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
    narrow = [kernel for kernel in found if kernel["layer"].startswith("144->24 ")]
    assert (len(found), len(narrow)) == (15, 6)  # pointwise ones in either layout
    for kernel in found:
        assert kernel["single loads"] == 0, kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        if kernel not in narrow:
            assert kernel["products"] > 0, kernel
            assert kernel["copies"] == [16], kernel


FINE = {"kernel": "convolve", "shared": 64 << 10, "threads": 128, "registers": 168, "spilled": 0}
FINE |= {"matrix": 32, "single loads": 0, "odd": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"error": "no"}, "does not compile: no"),
        ({"shared": 228 << 10}, "228 KB of shared memory, 227 are there"),
        ({"threads": 512, "registers": 255}, "512 threads of 255 registers do not fit"),
        ({"spilled": 16}, ""),
        ({"spilled": 17}, "17 reloads of spilled values"),
        ({"spilled": 32, "kernel": "convolve_on_chip"}, ""),
        ({"single loads": 4}, "4 loads of single values"),
        ({"single loads": 4, "odd": True}, ""),
    ],
)
def test_budgets_that_are_exceeded_are_named(script, change, words):
    kernel = {**FINE, **change}
    kernel["programs"] = script.TARGETS["sm_90"].programs_of(kernel)
    assert script.exceeded(kernel, "sm_90") == words


@pytest.mark.parametrize(
    ("target", "change", "programs"),
    [
        ("sm_90", {}, 3),  # by registers; 3 by shared memory as well
        ("sm_90", {"shared": 0, "registers": 32}, 16),  # by threads
        ("sm_80", {"shared": 80 << 10, "registers": 32}, 2),  # each takes one KB beside
        ("sm_75", {"shared": 32 << 10, "registers": 32}, 2),  # where it does not
        ("gfx942", {"threads": 256, "shared": 16 << 10}, 3),
        ("gfx942", {"threads": 256, "shared": 40 << 10}, 1),
    ],
)
def test_programs_of_a_multiprocessor(script, target, change, programs):
    assert script.TARGETS[target].programs_of({**FINE, **change}) == programs


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
