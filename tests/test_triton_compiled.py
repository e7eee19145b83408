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


def can_compile() -> bool:
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    from triton.backends import backends  # a build without the NVIDIA one cannot

    return "nvidia" in backends


@pytest.mark.skipif(not can_compile(), reason="needs Triton's compiler for NVIDIA GPUs")
def test_kernels_load_whole_vectors_and_use_the_matrix_units(tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert [f["kernel"] for f in found] == 2 * ["convolve", "convolve", "kernel_gradient"]
    for kernel in found:
        assert kernel["products"] > 0, kernel
        assert kernel["copies"] == [16], kernel
        assert kernel["plain loads"] == 0, kernel
        assert kernel["shared"] <= 227 << 10, kernel
