"""Training is the same with every back end: short curves here, 200 updates by the script.

``scripts/compare_backends.py`` runs the long comparison; docs/experiments.md has its result.
"""

from __future__ import annotations

import runpy
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from breadth import breadth

from kw.warehouse.ops import CONTRACTIONS

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_backends.py"
CurveSettings, compare, deviations, force_where_possible, output_errors, start = itemgetter(
    "CurveSettings", "compare", "deviations", "force_where_possible", "output_errors", "start"
)(runpy.run_path(str(SCRIPT), run_name="read"))
SHORT = CurveSettings(steps=6, batch=4, size=32)


@pytest.mark.parametrize(
    "dtype", breadth([torch.float64, torch.float32, torch.bfloat16], [torch.float32])
)
def test_curves_agree(dtype):
    """Rounding apart after one update, and its growth within half the digits after six."""
    curves = compare([*CONTRACTIONS, "grouped", "auto"], SHORT, dtype)
    assert {"assembled", "bmm", "mix_inputs", "auto"} <= set(curves)
    eps = torch.finfo(dtype).eps
    for name, deviation in deviations(curves).items():
        assert deviation.first < 100 * eps, (name, deviation)
        assert deviation.mean < eps**0.5, (name, deviation)
    assert len(set(curves["reference"])) == SHORT.steps  # the loss moves


def test_depthwise_layers_take_part():
    settings = CurveSettings(steps=3, batch=4, size=32, model="convnext")
    network = start(settings)
    assert force_where_possible(network, "depthwise") == 4
    curves = compare(["depthwise"], settings, torch.float64)
    assert deviations(curves)["depthwise"].worst < 1e-11


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The comparison has teeth: a back end whose gradient of the cells is a percent too small."""
    right = CONTRACTIONS["assembled"].backward

    def wrong(*args):
        dx, dalpha, dcells = right(*args)
        return dx, dalpha, None if dcells is None else 0.99 * dcells

    monkeypatch.setattr(CONTRACTIONS["assembled"], "backward", wrong)
    settings = CurveSettings(steps=3, batch=4, size=32)
    found = deviations(compare(["assembled"], settings, torch.float64))["assembled"]
    assert found.first > 1e-7
    assert found.mean > 1e-5


def test_output_errors_are_ordered():
    errors = output_errors(CurveSettings(steps=3, batch=4, size=32))
    assert errors["float32"] < 1e-4 < errors["bfloat16"] < 0.2
    assert 1e-4 < errors["bfloat16, assembled in float32"] < 0.2
