"""Bytes, launches and saved tensors of a training step in 16 bit, counted without a GPU.

Contractions are replaced by one that computes nothing, so that whole networks of the papers take no
time; what is counted is what happens around them. docs/benchmarks.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from breadth import breadth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kw  # noqa: F401 -- registers the models
from kw.warehouse import KWLayer, Warehouse
from kw.warehouse.ops import CONTRACTIONS, Cost, selector
from kw.warehouse.ops.contraction import Contraction

MB = 1e6


class Nothing(Contraction):
    """Outputs and gradients of the right shapes, without work."""

    name = "nothing"

    def refusal(self, problem):
        return None

    def cost(self, problem):
        return Cost()

    def _forward(self, x, alpha, cells, spec):
        return x.new_zeros(len(x), spec.out_channels, *spec.output_size(x.shape[2:]))

    def _backward(self, grad, x, alpha, cells, spec, needs):
        return tuple(
            torch.zeros_like(t) if needed else None
            for t, needed in zip((x, alpha, cells), needs, strict=True)
        )


@dataclass
class Counts:
    """Of one training step.

    Attributes:
        rounded: bytes that conversions of cells write.
        kept: bytes of rounded cells that the backward pass keeps.
        gradients: bytes of cells' gradients that are allocated, in float32.
        launches: operators that compute something, apart from contractions.
    """

    rounded: int = 0
    kept: int = 0
    gradients: int = 0
    launches: int = 0
    places: set[int] = field(default_factory=set)


class Counting(TorchDispatchMode):
    def __init__(self, counts: Counts, cells: list[Tensor]) -> None:
        super().__init__()
        self.counts = counts
        self.cells = {cell.data_ptr() for cell in cells}
        self.shapes = {tuple(cell.shape) for cell in cells}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if is_view or schema.name.endswith(("::empty", "::detach", "::promote_types")):
            return result
        self.counts.launches += 1
        if isinstance(result, Tensor) and tuple(result.shape) in self.shapes:
            if schema.name == "aten::_to_copy" and args[0].data_ptr() in self.cells:
                self.counts.rounded += result.nbytes
                self.counts.places.add(result.data_ptr())
            elif result.dtype == torch.float32 and "add_" not in schema.name:
                self.counts.gradients += result.nbytes
        return result


def count(name: str, **settings: Any) -> tuple[Counts, list[Warehouse], int]:
    model = timm.create_model(name, num_classes=10, **settings)
    warehouses = list(dict.fromkeys(m for m in model.modules() if isinstance(m, Warehouse)))
    cells = [warehouse.cells for warehouse in warehouses]
    counts = Counts()
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no place is taken twice

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.data_ptr() in counts.places:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with Counting(counts, cells), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(2, 3, 32, 32))
        y.float().sum().backward()
    counts.kept = sum(kept.values())
    layers = sum(isinstance(module, KWLayer) for module in model.modules())
    return counts, warehouses, layers


@pytest.fixture(autouse=True)
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTRACTIONS, "nothing", Nothing())
    monkeypatch.setattr(selector, "_chosen", {})


MODELS = [
    "kw_resnet18_1x",
    "kw_resnet50_1x",
    "kw_resnet50_4x",
    "kw_mobilenetv2_050_1x",
    "kw_convnext_tiny_1x",
]


@pytest.mark.parametrize("name", breadth(MODELS, ["kw_resnet50_4x", "kw_mobilenetv2_050_1x"]))
def test_cells_are_rounded_and_kept_once_a_warehouse(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, warehouses, layers = count(name)
    half = sum(2 * warehouse.cells.numel() for warehouse in warehouses)
    assert layers > len(warehouses)
    assert counts.rounded == half
    assert counts.kept == half
    # One float32 gradient a warehouse; every other layer adds to it.
    assert counts.gradients == 2 * half
    # Every layer for itself, as before.
    monkeypatch.setattr("kw.warehouse.ops.may_share", lambda *_: False)
    monkeypatch.setattr("kw.warehouse.ops.function.anchor_of", lambda _: None)
    apart, _, _ = count(name)
    assert apart.rounded == apart.kept > counts.rounded
    assert apart.gradients > counts.gradients
    assert apart.launches > counts.launches
    print(f"{name}: {layers} layers, {len(warehouses)} warehouses")
    for what in ("rounded", "kept", "gradients"):
        before, now = getattr(apart, what) / MB, getattr(counts, what) / MB
        print(f"  {what}: {before:.0f} -> {now:.0f} MB")
    print(f"  launches: {apart.launches} -> {counts.launches}")


def test_launches_of_the_attention() -> None:
    """Per layer, beside what the static network launches."""
    counts, _, layers = count("kw_resnet50_1x")
    model = timm.create_model("resnet50", num_classes=10)
    static = Counts()
    with Counting(static, []):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(2, 3, 32, 32))
        y.float().sum().backward()
    print(counts.launches, static.launches, layers, (counts.launches - static.launches) / layers)
    assert (counts.launches - static.launches) / layers <= 40
