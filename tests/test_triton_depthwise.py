"""The Triton back end of depthwise layers against the reference, and where it is chosen.

tests/test_triton.py runs this file in the interpreter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from breadth import breadth
from convolutions import CASES, HALVES, WHOLE, Case, problem
from triton_checks import (
    INTERPRETED,
    compare,
    runs_kernels,
)

from kw.warehouse.ops import CONTRACTIONS, selector, triton_depthwise
from kw.warehouse.ops.gpus import GPUS
from kw.warehouse.ops.triton_depthwise import TritonDepthwise

DEPTHWISE = {
    "2d": replace(CASES["2d depthwise"], batch=2),
    "2d pointwise": CASES["2d pointwise depthwise"],
    "1d strided": Case((4,), (11,), (6, 6), 2, 1, groups=6, batch=2, settings=HALVES),
    "2d in no way even": Case(
        (3, 2), (9, 7), (20, 20), (2, 1), (2, 0), (1, 2), groups=20, batch=2, settings=HALVES
    ),
    "2d whole cells": Case((3, 3), (6, 5), (18, 18), padding=1, groups=18, batch=3, settings=WHOLE),
    "2d seven taps": Case((7, 7), (5, 6), (4, 4), padding=3, groups=4, batch=2),
    "1d as many taps as bits": Case((32,), (40,), (4, 4), padding=3, groups=4, batch=1),
    "2d stride beyond kernel": Case((2, 1), (7, 7), (4, 4), stride=3, padding=(1, 0), groups=4),
    "2d many channels": Case((3, 3), (3, 4), (70, 70), padding=1, groups=70, batch=2),
    "3d": Case((2, 3, 1), (4, 5, 3), (5, 5), (1, 2, 1), (1, 0, 0), groups=5, batch=2),
}


@runs_kernels
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", breadth(DEPTHWISE, ["2d in no way even", "3d"]))
def test_equals_reference(name, channels_last):
    compare(TritonDepthwise(), DEPTHWISE[name], channels_last)


@runs_kernels
@pytest.mark.parametrize("name", breadth(DEPTHWISE, ["2d whole cells"]))
def test_samples_in_chunks(name, monkeypatch):
    monkeypatch.setattr(triton_depthwise, "sample_chunks", one_by_one)
    compare(TritonDepthwise(), DEPTHWISE[name], channels_last=True)


def one_by_one(batch, values, like):
    return [slice(i, i + 1) for i in range(batch)]


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision(dtype, tolerance):
    compare(TritonDepthwise(), DEPTHWISE["2d whole cells"], True, dtype, tolerance)
    compare(TritonDepthwise(), DEPTHWISE["2d seven taps"], True, dtype, tolerance, torch.float32)


def test_what_it_refuses():
    backend = TritonDepthwise()
    layer = DEPTHWISE["2d"].make()[-1]
    like = replace(problem(8, device="cuda"), spec=layer, size=(7, 9))
    if not INTERPRETED:
        assert "on CUDA devices" in backend.refusal(replace(like, device="mps"))
    assert "not float64" in backend.refusal(replace(like, dtype=torch.float64))
    assert "2^31" in backend.refusal(replace(like, size=(40000, 40000)))
    assert "depthwise layers" in backend.refusal(problem(8, device="cuda"))
    multiplier = CASES["2d depthwise multiplier"].make()[-1]
    assert "depthwise layers" in backend.refusal(replace(like, spec=multiplier))
    assert backend.needs_trial(like)


@pytest.mark.parametrize("gpu", ["a100", "h100", "rtx4090"])
@pytest.mark.parametrize("training", [False, True])
def test_is_chosen_for_channels_last_images(gpu, training):
    """A library would copy images to channels first and back: more bytes than the layer has."""
    case = Case((3, 3), (14, 14), (384, 384), padding=1, groups=384)
    like = replace(
        problem(8, device="cuda", dtype=torch.bfloat16, training=training, batch=128),
        spec=case.make()[-1],
        size=(14, 14),
        cells=8,
    )
    profile = GPUS[gpu].profile()
    best = selector.predict(replace(like, channels_last=True), profile)[0]
    assert best.name == "triton_depthwise"
    assert math.isfinite(best.seconds)


@pytest.mark.parametrize("training", [False, True])
def test_changes_of_layout_count_where_they_happen(training):
    """The library's kernels of a GPU take channels first; a CPU's take images as they lie."""
    case = Case((3, 3), (56, 56), (96, 96), padding=1, groups=96)
    like = replace(problem(8, training=training, batch=8), spec=case.make()[-1], size=(56, 56))
    for name in ("depthwise", "assembled"):
        cost = CONTRACTIONS[name].cost
        last = replace(like, channels_last=True)
        assert cost(like).waiting_bytes == cost(last).waiting_bytes == 0
        there = replace(like, device="cuda")
        assert cost(there).waiting_bytes == 0
        copied = cost(replace(there, channels_last=True)).waiting_bytes
        values = 8 * (like.input_numel + like.output_numel) * (3 if training else 1)
        assert copied == 2 * 4 * values
