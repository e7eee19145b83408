"""Converted networks in a user's own exports: traces, torch.onnx, dynamic quantisation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from breadth import breadth
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import kw
from kw.warehouse import KWConv2d, KWLinear

NARROW: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    "convnext_atto": {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
}


def dynamic_network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4, **NARROW.get(name, {}))
    return kw.convert(network, "auto", start="paper").eval()


each_kind = pytest.mark.parametrize(
    "name",
    breadth([*NARROW, "mobilenetv2_035"], NARROW),  # the last two have depthwise layers
)


@each_kind
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_trace_takes_images_of_any_number_and_size(name: str, batch: int) -> None:
    network = dynamic_network(name)
    traced = torch.jit.trace(network, torch.randn(batch, 3, 64, 64), check_trace=False)
    for images in (torch.randn(1, 3, 64, 64), torch.randn(3, 3, 96, 80)):
        torch.testing.assert_close(traced(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [KWConv2d(4, 6, 3, padding=1), KWLinear(4, 6)], ids=str)
def test_a_trace_with_gradients_on_can_be_saved(layer: nn.Module) -> None:
    layer.eval()
    x = torch.randn(2, 4, 5, 5) if isinstance(layer, KWConv2d) else torch.randn(2, 5, 4)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x, check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))


@each_kind
@pytest.mark.parametrize("way", ["traced", "exported"])
@pytest.mark.parametrize("batch", breadth([1, 2], [2]))
@torch.no_grad()
def test_a_users_own_onnx_export_takes_any_number_of_images(
    name: str, way: str, batch: int, tmp_path: Path
) -> None:
    if name != "resnet18" and way == "exported":
        pytest.skip("ONNX fixes a convolution's groups: kw.deploy exports depthwise layers")
    runtime = pytest.importorskip("onnxruntime")
    network, path = dynamic_network(name), tmp_path / "network.onnx"
    if way == "exported":  # the exporter takes a second for every layer
        network.layer2 = network.layer3 = network.layer4 = nn.Identity()
        network.fc = nn.Linear(8, 4)
    images = torch.randn(batch, 3, 64, 64)
    if way == "traced":
        axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch", 2: "h", 3: "w"}}}
        torch.onnx.export(network, (images,), path, dynamo=False, **axes)
    else:
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes)
    session = runtime.InferenceSession(path)
    for count in (1, 2, 3):
        images = torch.randn(count, 3, 64, 64 + 16 * count if way == "traced" else 64)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per")
@torch.no_grad()
def test_dynamic_quantisation_of_other_layers() -> None:
    network, images = dynamic_network("resnet18"), torch.randn(2, 3, 64, 64)
    kinds = {torch.nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(network, kinds, dtype=torch.qint8)
    expected = network(images)
    assert (quantised(images) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("method", [None, "condconv", "odconv", "fdconv"])
def test_a_graph_of_make_fx_computes_what_the_network_does(method: str | None) -> None:
    """Compiled code left no trace in it: the outputs of dynamic layers were memory as found."""
    torch.manual_seed(0)
    network: Any = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2)))
    if method is None:
        kw.convert(network, {"rules": [{"match": "[01]", "warehouse": "w"}], "start": "paper"})
    else:
        kw.peers.convert(network, method, layers="[01]", start="paper", kernels=4)
    images, others = torch.randn(2, 2, 32, 14, 14)
    graph = make_fx(network.eval())(images)
    torch.testing.assert_close(graph(others), network(others))

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(network(x).square().sum(), x)[0]

    recorded = make_fx(gradient)(images.requires_grad_())
    expected = gradient(others.requires_grad_())
    assert (recorded(others) - expected).abs().max() < 1e-5 * expected.abs().max()
