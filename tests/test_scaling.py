"""The formula of docs/scaling.md, by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from kw.config import ConfigError, load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_reduction(scaling: Any) -> None:
    links = scaling.Links(8, 100.0, 10.0, 1.0, 5.0, 0.5)
    assert links.all_reduce(800.0, 1) == 0
    assert links.all_reduce(800.0, 2) == pytest.approx(0.5 + 8 + 2)
    ring_in_the_node = 2 * 7 / 8 * 800 / 100 + 2 * 7 * 1
    assert links.all_reduce(800.0, 8) == pytest.approx(0.5 + ring_in_the_node)
    tree = 2 * 100 / 10 + 2 * 4 * 5  # of 16 nodes; a ring would take 15 * 2 steps of 5 seconds
    assert links.all_reduce(800.0, 128) == pytest.approx(0.5 + ring_in_the_node + tree)
    with pytest.raises(ConfigError, match="--gpus 12: expected whole nodes of 8"):
        links.all_reduce(800.0, 12)


def test_what_the_backward_pass_does_not_hide(scaling: Any) -> None:
    def reduce(size: float) -> float:
        return size / 10

    gradients = [(1.0, 5), (0.2, 40), (0.5, 20)]
    # One by one: ends at 2 + 4 = 6, 6 + 2 = 8, 10 + 0.5.
    assert scaling.exposed(gradients, 10.0, 1, reduce) == pytest.approx(0.5)
    # The first two in one bucket, which is there at 5: 5 + 6 = 11, then 0.5.
    assert scaling.exposed(gradients, 10.0, 50, reduce) == pytest.approx(1.5)
    assert scaling.exposed(gradients, 10.0, 100, reduce) == pytest.approx(6.5)


def test_a_step_that_is_measured(scaling: Any) -> None:
    config = load_config(ROOT / "configs" / "demo" / "kw_resnet18_1x.yaml", [])
    step, gradients = scaling.profile(config, 2, "cpu")
    assert len(step) == 3
    assert min(step) > 0
    assert all(0 <= ready <= 1 for ready, _ in gradients)
    assert sum(size for _, size in gradients) > 10**6
