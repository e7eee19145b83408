"""What is predicted for GPUs that are not here: of unknown ones, and of what is done or not done
because of predictions; ``-s`` prints them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from test_selection import problem

from kw.warehouse import explain
from kw.warehouse.ops import pointwise, selector
from kw.warehouse.ops.contraction import Contraction, Cost, Problem
from kw.warehouse.ops.device import DeviceProfile
from kw.warehouse.ops.gpus import GPUS, gpu_of
from kw.warehouse.ops.mix_inputs import MixInputs
from kw.warehouse.ops.triton_conv import TritonConv

AMD = {"mi250x": "gfx90a:sramecc+:xnack-", "mi300x": "gfx942:sramecc+:xnack-"}


def properties(name: str, shown: str, full: bool) -> Any:
    """What torch says of a GPU; not always its clocks and the memory's width."""
    gpu = GPUS[name]
    major, minor = gpu.capability
    found = SimpleNamespace(name=shown, major=major, minor=minor, multi_processor_count=gpu.units)
    if name in AMD:
        found.major, found.minor, found.gcnArchName = 9, 4 if name == "mi300x" else 0, AMD[name]
    if full:
        found.clock_rate, found.memory_clock_rate = gpu.clock / 1e3, 5e6
        found.memory_bus_width = gpu.bandwidth * 8 / 2 / 5e9
    return found


@pytest.fixture(scope="module")
def layers() -> dict[str, list[Any]]:
    """Both passes of all layers of some networks at batches of 1 and 128."""
    found = {}
    for name in ("kw_resnet18_1d4x", "kw_resnet50_1x", "kw_resnet50_4x", "kw_mobilenetv2_100_1x"):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        with torch.no_grad():  # values do not count, and drawing them takes seconds
            for value in [*model.to_empty(device="cpu").parameters(), *model.buffers()]:
                value.zero_()
            choices = explain(model, torch.zeros(1, 3, 224, 224))
        problems = dict.fromkeys(choice.problem for choice in choices)
        for batch in (1, 128):
            for dtype in (torch.float32, torch.bfloat16):
                found[f"{name} {batch} {dtype}"] = [
                    replace(p, batch=batch, dtype=dtype, device="cuda", training=training)
                    for p in problems
                    for training in (False, True)
                ]
    return found


def regret(problems: list[Any], guessed: DeviceProfile, true: DeviceProfile) -> float:
    """Time by the choices that guessed rates lead to, over the least, both by the true rates."""

    def times(p: Any, profile: DeviceProfile) -> dict[str, float]:
        return {each.name: each.seconds for each in selector.predict(p, profile) if each.seconds}

    chosen = least = 0.0
    for p in problems:
        guess, own = times(p, guessed), times(p, true)
        chosen += own[min(guess, key=lambda name: guess[name])]
        least += min(own.values())
    return chosen / least


@pytest.mark.parametrize(("name", "is_old"), [("t4", True), ("a100", False), ("mi300x", False)])
def test_a_gpu_that_is_not_here_refuses_as_it_would(name: str, is_old: bool) -> None:
    for dtype in (torch.float32, torch.float16):
        case = problem(64, 28, batch=32, device="cuda", dtype=dtype)
        found = {each.name: each for each in selector.predict(case, GPUS[name].profile())}
        assert ("capability 8.0" in found["triton"].refusal) == is_old
        assert (found["triton"].seconds is None) == is_old


@pytest.mark.parametrize("name", GPUS)
def test_unknown_gpus_get_rates_that_cost_little(name: str, layers: dict[str, list[Any]]) -> None:
    """One that has no data sheet here, of which torch does not say clocks and memory."""
    guessed = gpu_of(properties(name, "GeForce X" if "rtx" in name else "X", full=False)).profile()
    for network, problems in layers.items():
        assert regret(problems, guessed, GPUS[name].profile()) <= 1.3, network


def possible(gpu: str, problem: Problem) -> dict[str, float]:
    """Predicted seconds by back end, fastest first; a T4 is too old for the Triton kernels."""
    return {
        each.name: each.seconds
        for each in selector.predict(problem, GPUS[gpu].profile())
        if each.seconds is not None
    }


def backward_parts(op: Contraction, problem: Problem) -> dict[str, Cost]:
    """What a back end's backward pass costs: the whole; the gradients of the input, of coefficients
    and cells (kernels), and of coefficients or cells alone, if it were asked for them only."""
    both, forward = op.cost(problem), op.cost(replace(problem, training=False))
    whole = less(both, forward)

    def share(cost: Cost, calls: float) -> Cost:  # of five products, as of their calls
        return replace(cost, launches=calls / 5 * whole.launches)

    if isinstance(op, TritonConv):
        kernels = op.cost_of_kernel_gradients(problem)
        product = Cost(problem.assembly_macs, bytes=problem.batch * problem.kernel_numel * 2)
        parts = {"x": less(whole, kernels), "kernels": kernels, "alpha": less(kernels, product)}
    elif isinstance(op, MixInputs):  # a dense product and a mixing one for each
        parts = {"kernels": share(forward + forward, 3), "cells": share(forward, 1.5)}
        parts["x"] = share(forward, 2)
    else:
        parts = {"x": share(forward, 2), "kernels": share(less(whole, forward), 3)}
    return {"whole": whole, **parts}


def less(a: Cost, b: Cost) -> Cost:
    return Cost(**{key: max(value - vars(b)[key], 0) for key, value in vars(a).items()})


@pytest.mark.parametrize("name", GPUS)
def test_gradients_are_not_worth_planning_apart(name: str, layers: dict[str, list[Any]]) -> None:
    """Were the gradients of the input and of the kernels planned apart, or the cells' taken from
    mixed inputs, a backward pass of 128 samples would gain at most 3%: they are planned as one."""
    profile = GPUS[name].profile()
    for network, problems in layers.items():
        together = apart = 0.0
        for p in (p for p in problems if p.training and p.batch > 1):
            best: dict[str, float] = {}
            for each in possible(name, p):
                op = selector.contractions[each]
                for part, cost in backward_parts(op, p).items():
                    seconds = profile.seconds(cost, p.dtype, op.efficiency.get("cuda", 1.0))
                    best[part] = min(best.get(part, seconds), seconds)
            ways = [best["whole"], best["x"] + best["kernels"]]
            if {"alpha", "cells"} <= set(best):
                ways.append(best["x"] + best["alpha"] + best["cells"])
            together += ways[0]
            apart += min(ways)
        print(f"{name} {network}: {1e3 * together:.1f} ms, apart {1e3 * apart:.1f}")
        assert together <= 1.03 * apart, network


@pytest.mark.parametrize("name", GPUS)
def test_blocks_where_they_lie_gain(
    name: str, layers: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted times of the back end bmm and of the best ones."""
    for network, problems in layers.items():
        found = []
        for copying in (("cpu", "cuda"), ("cpu",)):
            monkeypatch.setattr(pointwise, "_ALWAYS_COPY", copying)
            some = [possible(name, p) for p in problems]
            found += [sum(times["bmm"] for times in some), sum(min(t.values()) for t in some)]
        bmm, best, new, new_best = found
        print(f"{name} {network}: bmm {new / bmm - 1:.1%}, best {new_best / best - 1:.1%}")
        assert new_best <= best, network
        assert new <= bmm or "resnet50" not in network


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("l4", "NVIDIA L4"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("mi300x", "AMD Instinct MI300X"),
    ],
)
def test_known_gpus_have_their_data_sheets(name: str, shown: str, full: bool) -> None:
    found, sheet = gpu_of(properties(name, shown, full)), GPUS[name]
    assert found.profile().dense == pytest.approx(sheet.profile().dense)
    assert found.bandwidth == pytest.approx(sheet.bandwidth)


def test_an_l40_is_not_an_l4() -> None:
    found = gpu_of(properties("l4", "NVIDIA L40S", full=False))
    assert found.bandwidth != GPUS["l4"].bandwidth
