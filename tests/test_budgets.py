"""Bytes, launches and saved tensors of a training step in 16 bit, counted without a GPU.

Contractions are replaced by one that computes nothing, so that whole networks of the papers take no
time; what is counted is what happens around them. docs/benchmarks.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import timm
import torch
from breadth import breadth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kw  # noqa: F401 -- registers the models
from kw.models import PAPER_MODELS
from kw.warehouse import KWConv2d, KWLayer, Warehouse
from kw.warehouse.ops import (
    CONTRACTIONS,
    ConvSpec,
    Cost,
    Problem,
    selector,
    triton_depthwise_kernels,
    triton_kernels,
)
from kw.warehouse.ops.contraction import Contraction
from kw.warehouse.ops.gpus import GPUS
from kw.warehouse.ops.timing import draw_operands

MB = 1e6
NOTHING = 5  # operators of the contraction that computes nothing: its output and gradients


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
        coefficients: bytes that the attentions' last steps keep for the backward pass.
    """

    rounded: int = 0
    kept: int = 0
    gradients: int = 0
    launches: int = 0
    coefficients: int = 0
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
    seen: set[int] = set()
    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    shapes = {
        (2, layer.attention.mixtures, layer.attention.cells + extra)
        for layer in layers
        for extra in (0, 1)
    }

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.data_ptr() in counts.places:
            kept[tensor.data_ptr()] = tensor.nbytes
        if tensor.shape in shapes and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            counts.coefficients += tensor.nbytes
        return tensor

    with Counting(counts, cells), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(2, 3, 32, 32))
        y.float().sum().backward()
    counts.kept = sum(kept.values())
    return counts, warehouses, len(layers)


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


@pytest.mark.parametrize("name", breadth(MODELS, ["kw_resnet18_1x", "kw_mobilenetv2_050_1x"]))
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


@pytest.mark.parametrize("name", breadth(MODELS, ["kw_resnet50_1x"]))
def test_launches_of_the_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per layer, beside what the static network launches."""
    plain, _, layers = count(name)
    model = timm.create_model(PAPER_MODELS[name].backbone, num_classes=10)
    static = Counts()
    with Counting(static, []):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(2, 3, 32, 32))
        y.float().sum().backward()
    launched = fuse(monkeypatch)
    fused, _, _ = count(name)
    assert launched == 2 * layers * [1]
    found = [
        (counts.launches + extra - static.launches) / layers - NOTHING
        for counts, extra in ((plain, 0), (fused, len(launched)))
    ]
    print(f"{name}: {found[0]:.1f} -> {found[1]:.1f} launches a layer beside the static network's")
    print(f"  kept by attention: {plain.coefficients / MB:.2f} -> {fused.coefficients / MB:.2f} MB")
    assert found[1] <= 17
    assert found[0] - found[1] >= 15
    assert fused.coefficients < 0.8 * plain.coefficients


def fuse(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; the list gets an entry for every launch of the fused kernels."""
    launched: list[int] = []

    def launch(logits: Tensor, one_hot: Any, temperature: Any, dtype: torch.dtype) -> Any:
        launched.append(1)
        batch, mixtures, width = logits.shape
        alpha = torch.empty(width - 1, batch, mixtures, dtype=dtype).permute(1, 2, 0)
        return alpha, torch.empty(())

    def gradient(grad: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
        launched.append(1)
        return torch.empty(logits.shape)

    monkeypatch.setattr("kw.warehouse.attention.is_fused", lambda *_: True)
    monkeypatch.setattr("kw.warehouse.ops.coefficients.launch", launch)
    monkeypatch.setattr("kw.warehouse.ops.coefficients.launch_gradient", gradient)
    return launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_pooling_writes_no_gradient_of_the_inputs_size(
    dtype: torch.dtype, channels_last: bool
) -> None:
    """The two gradients of a layer's input are added; only the sum is as large as the input."""
    layer = KWConv2d(8, 8, 3, padding=1, start="paper")
    x = torch.randn(4, 8, 6, 6).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    written: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            is_whole = isinstance(result, Tensor) and result.shape == x.shape
            if is_whole and not any(r.alias_info for r in func._schema.returns):
                written.append(func._schema.name)
            return result

    weight = torch.ones_like(y)
    with Watching():
        y.backward(weight)
    assert written == ["aten::zeros_like", "aten::add"]  # the convolution's; the sum
    assert x.grad is not None
    assert x.grad.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def layers_of(name: str) -> list[tuple[ConvSpec, int, tuple[int, ...]]]:
    """Distinct layers of a network at 224 pixels whose images have 14x14 or 7x7 positions."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found: list[tuple[ConvSpec, int, tuple[int, ...]]] = []

    def note(layer: Any, inputs: Any, _: Any) -> None:
        size = tuple(inputs[0].shape[2:])
        if size in ((14, 14), (7, 7)):
            found.append((layer.spec, len(layer.warehouse.cells), size))

    for module in model.modules():
        if isinstance(module, KWConv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return list(dict.fromkeys(found))


class LayoutChanges(TorchDispatchMode):
    """Copies between channels first and channels last of tensors of some shapes."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::clone", "aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            layouts = {layout_of(source), layout_of(result)}
            if source.shape in self.shapes and layouts == {"first", "last"}:
                self.found.append((name, tuple(source.shape)))
        return result


def layout_of(image: Tensor) -> str | None:
    if image.is_contiguous():
        return "first"
    return "last" if image.is_contiguous(memory_format=torch.channels_last) else None


class Unlaunched:
    """A kernel that does nothing; its operands are as a GPU's would be."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.mark.parametrize("name", breadth([*MODELS, "kw_mobilenetv2_100_1x"], ["kw_resnet50_1x"]))
def test_no_layout_changes_at_small_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what would be chosen on a GPU for channels-last images, run on the CPU."""
    monkeypatch.delitem(CONTRACTIONS, "nothing")
    for module in (triton_kernels, triton_depthwise_kernels):
        for kernel in module.__all__:
            monkeypatch.setattr(module, kernel, Unlaunched())
    profiles = {gpu: GPUS[gpu].profile() for gpu in ("a100", "h100", "rtx4090")}
    chosen: dict[str, set[str]] = {gpu: set() for gpu in profiles}
    for spec, cells, size in layers_of(name):
        for training in (False, True):
            there = Problem(spec, cells, 128, size, torch.bfloat16, "cuda", training, True)
            best = {gpu: selector.predict(there, profiles[gpu])[0].name for gpu in profiles}
            for each in set(best.values()):  # run once, whichever GPUs it is chosen on
                operands = draw_operands(replace(there, batch=2, device="cpu"))
                with LayoutChanges({operands.x.shape, operands.grad.shape}) as changes:
                    image = operands.run(CONTRACTIONS[each])[0]
                assert changes.found == [], each
                assert image.is_contiguous(memory_format=torch.channels_last), each
            for gpu, each in best.items():
                chosen[gpu].add(each)
    assert all(names & {"triton", "triton_depthwise"} for names in chosen.values()), chosen
