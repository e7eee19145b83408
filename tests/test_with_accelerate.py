"""examples/accelerate_loop.py with the real package: ``make test-integrations``."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import kw
from kw.integrations.core import Recipe

pytest.importorskip("accelerate", reason="needs accelerate")

EXAMPLE = Path(__file__).parents[1] / "examples" / "accelerate_loop.py"
BATCHES, ACCUMULATE, ANNEAL = 12, 2, 2


def run(out, *more, processes=1):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), EXAMPLE, out, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"epoch (\d): loss ([\d.]+), temperature ([\d.]+)", result.stdout)
    return {int(e): (float(loss), float(tau)) for e, loss, tau in found}


def last_temperature(epoch, batches):
    first = (batches - 1) // ACCUMULATE * ACCUMULATE
    return pytest.approx(max(0, 1 - (epoch - 1 + first / batches) / ANNEAL), abs=1e-5)


def test_a_resumed_loop_equals_an_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole")
    assert [tau for _, tau in whole.values()] == [last_temperature(e, BATCHES) for e in (1, 2, 3)]
    assert whole[3][0] < 0.5 * math.log(2)  # half of what guessing has
    resumed = run(tmp_path / "resumed", "--resume", tmp_path / "whole" / "epoch_1")
    assert resumed == {epoch: whole[epoch] for epoch in (2, 3)}
    load = safetensors.torch.load_file
    one, other = (
        load(tmp_path / n / "epoch_3" / "model.safetensors") for n in ("whole", "resumed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    model = Recipe("auto").convert(
        timm.create_model("resnet10t", num_classes=2), torch.rand(2, 3, 32, 32)
    )
    model.load_state_dict(one)
    assert kw.get_temperature(model) == 0


def test_two_processes(tmp_path):
    found = run(tmp_path, processes=2)
    temperatures = [last_temperature(e, BATCHES // 2) for e in (1, 2, 3)]
    assert [tau for _, tau in found.values()] == temperatures
    assert found[3][0] < math.log(2)  # of guessing
