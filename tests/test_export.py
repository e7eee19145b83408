"""Exported files: forms of dynamic layers, what is left in the graph, agreement with PyTorch."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from breadth import breadth
from deployment import CLASSES, SETTINGS, random_source, randomise, write_checkpoint
from timm.layers import Conv2dSame
from torch import nn

import kw
from kw.config import config_from_mapping
from kw.config.names import name_of_config
from kw.config.schema import ModelConfig
from kw.deploy import ExportError, export, read_source
from kw.deploy.description import InputRange
from kw.deploy.export import Exporter, Options, check_target
from kw.deploy.graph import Graph, input_range, trace
from kw.deploy.onnx_file import OnnxNetwork, write_onnx, write_program
from kw.models import build_network
from kw.registry import EXPORTERS
from kw.warehouse import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    fold_temperature,
    has_temperature,
)
from kw.warehouse.ops import exported

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

COMPUTED = {
    "whole": lambda: KWConv2d(6, 8, 3, 2, padding=1, start="paper"),
    "cut": lambda: KWConv2d(
        8, 8, 3, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5, start="paper"
    ),
}


@pytest.mark.parametrize("cut", COMPUTED)
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_forms_for_a_runtime_are_the_definition(runtime: str, batch: int | None, cut: str) -> None:
    """``computed`` with open and fixed batch and, for OpenVINO on few positions, ``taps``."""
    torch.manual_seed(0)
    layer = COMPUTED[cut]().eval().requires_grad_(False)
    size = (3, 4) if runtime == "openvino" else (9, 7)
    example = torch.randn(batch or 3, layer.in_channels, *size)
    axes = {} if batch else {0: torch.export.Dim("batch")}
    with exported.exported_for(runtime):
        program = torch.export.export(layer, (example,), dynamic_shapes=(axes,))
    layer.set_backend("reference")
    for count in (1, 4) if batch is None else (batch,):
        x = torch.randn(count, *example.shape[1:])
        torch.testing.assert_close(program.module()(x), layer(x), atol=1e-6, rtol=1e-5)


XNNPACK = {
    "stride 1": lambda: KWConv2d(6, 8, 3, padding=1, start="paper"),
    "no padding, dilation, cut in 4": lambda: KWConv2d(
        8, 8, 3, dilation=2, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5, start="paper"
    ),
    "stride 2": lambda: KWConv2d(6, 8, 3, 2, padding=1, start="paper"),
    "stride 3, dilation, groups": lambda: KWConv2d(
        8, 12, 5, 3, padding=4, dilation=2, groups=2, start="paper"
    ),
    "groups": lambda: KWConv2d(8, 12, 3, padding=1, groups=2, start="paper"),
    "depthwise, stride 2": lambda: KWConv2d(8, 8, 3, 2, padding=1, groups=8, start="paper"),
    "depthwise, unlike axes": lambda: KWConv2d(
        8, 8, (3, 5), (2, 1), padding=(1, 3), dilation=(1, 2), groups=8, start="paper"
    ),
    "depthwise, two filters a channel": lambda: KWConv2d(
        4, 8, 3, 2, padding=1, groups=4, start="paper"
    ),
    "unlike axes": lambda: KWConv2d(6, 8, (3, 2), padding=(2, 1), dilation=(2, 1), start="paper"),
    "stride 2, unlike axes": lambda: KWConv2d(6, 8, (3, 2), (1, 2), padding=(2, 1), start="paper"),
    "pointwise, stride 2": lambda: KWConv2d(8, 12, 1, 2, start="paper"),
    "cells span space": lambda: KWConv2d(8, 8, 3, spatial_partition=False, start="paper"),
}


@pytest.mark.parametrize(
    ("case", "batch"),
    breadth(
        product(XNNPACK, (1, 3)),
        [*((case, 3) for case in XNNPACK), ("groups", 1), ("cells span space", 1)],
    ),
)
def test_the_form_for_xnnpack_is_the_definition(case: str, batch: int) -> None:
    torch.manual_seed(0)
    layer = XNNPACK[case]().eval().requires_grad_(False)
    x = torch.randn(batch, layer.in_channels, 10, 9)
    with exported.exported_for("executorch"):
        program = torch.export.export(layer, (x,))
    operators = {str(node.target) for node in program.graph.nodes}
    assert "aten.conv2d.default" not in operators
    layer.set_backend("reference")
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-6, rtol=1e-5)


FORMS = {
    "columns": (lambda: KWConv2d(6, 8, 3, 2, padding=1, start="paper"), (6, 9, 7), "conv_bmm"),
    "columns cut in 4": (
        lambda: KWConv2d(8, 8, 3, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5, start="paper"),
        (8, 9, 9),
        "conv_bmm",
    ),
    "columns of whole kernels": (
        lambda: KWConv2d(4, 6, 3, cell_num_ratio=4, spatial_partition=False, start="paper"),
        (4, 9, 9),
        "conv_bmm",
    ),
    "columns in groups": (
        lambda: KWConv2d(6, 8, 3, groups=2, start="paper"),
        (6, 9, 7),
        "conv_bmm",
    ),
    "columns 1d": (lambda: KWConv1d(6, 8, 3, dilation=2, start="paper"), (6, 219), "conv_bmm"),
    "columns 3d": (lambda: KWConv3d(4, 4, 3, padding=1, start="paper"), (4, 5, 6, 7), "conv_bmm"),
    "mixed": (
        lambda: KWConv2d(
            8, 8, 3, 2, cell_inplane_ratio=0.25, cell_outplane_ratio=0.5, start="paper"
        ),
        (8, 3, 3),
        "_conv_mixed",
    ),
    "mixed linear": (
        lambda: KWLinear(16, 8, cell_inplane_ratio=0.125, start="paper"),
        (16,),
        "_conv_mixed",
    ),
    "grouped": (
        lambda: KWConv2d(6, 6, 3, groups=6, padding=1, start="paper"),
        (6, 7, 5),
        "conv_grouped",
    ),
}


@pytest.mark.parametrize(("build", "shape", "form"), FORMS.values(), ids=FORMS)
def test_every_form_is_the_definition(build: Any, shape: Any, form: str, monkeypatch: Any) -> None:
    """Traced with an open batch, against one sample and one block at a time."""
    torch.manual_seed(0)
    layer = build().eval().requires_grad_(False)
    used = []
    for name in ("conv_bmm", "_conv_mixed", "conv_grouped"):
        inner = getattr(exported, name)

        def spy(*args: Any, name: str = name, inner: Any = inner) -> torch.Tensor:
            used.append(name)
            return inner(*args)

        monkeypatch.setattr(exported, name, spy)
    # With a bound: earlier versions of torch find one, beyond which grouped sizes are no int32.
    batch = {0: torch.export.Dim("batch", max=10_000)}
    program = torch.export.export(layer, (torch.randn(3, *shape),), dynamic_shapes=(batch,))
    assert used == [form]
    layer.set_backend("reference")
    for count in (1, 4):
        x = torch.randn(count, *shape)
        torch.testing.assert_close(program.module()(x), layer(x), atol=1e-6, rtol=1e-5)


class Everything(nn.Module):
    """Dynamic layers of every form beside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.dense = KWConv2d(8, 16, 3, 2, padding=1, norm="layer", start="paper")
        self.depthwise = KWConv2d(16, 16, 3, padding=1, groups=16, start="paper")
        self.head = KWLinear(16, 4, cell_inplane_ratio=0.125, start="paper")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.dense(self.stem(images)).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("batch", [None, 2])
def test_onnxruntime_computes_what_pytorch_does(batch: int | None, tmp_path: Path) -> None:
    """Depthwise layers loop over an open batch; a fixed one is grouped."""
    network = Everything()
    randomise(network, torch.randn(4, 3, 24, 24))
    network.eval().requires_grad_(False)
    inputs = InputRange(24, least=9, batch=batch)
    source = random_source(config_from_mapping(SETTINGS), "tiny")
    path = tmp_path / "net.onnx"
    program = trace(Graph(network), inputs, runtime="onnx")
    write_onnx(program, replace(source.description, input=inputs), path)
    graph = onnx.load(path).graph
    assert ("Scan" in {node.op_type for node in graph.node}) == (batch is None)
    constants = {tensor.name for tensor in graph.initializer}
    computed = [n for n in graph.node if n.op_type == "Conv" and n.input[1] not in constants]
    assert len(computed) == (0 if batch is None else 2)  # TensorRT 8 wants them constant
    assert [axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim] == [
        "" if batch else "batch",
        "",
        "height",
        "width",
    ]
    written = OnnxNetwork(path)
    for shape in ((24, 24), (9, 33), (40, 17)):
        for count in (1, 2, 5) if batch is None else (batch,):
            images = torch.randn(count, 3, *shape)
            torch.testing.assert_close(written(images), network(images), atol=1e-5, rtol=1e-5)


# torch.export of earlier versions adds conditions on open sizes, which its programs check.
EXPORTS_OPEN_SIZES = torch.__version__ >= "2.15"
MODELS: dict[str, dict[str, Any]] = {
    "kw low rank": {
        "kernel_warehouse": {"plan": "resnet18", "nonlocal_basis_ratio": 0.25, "start": "paper"}
    },
    "kw softmax": {
        "kernel_warehouse": {"plan": "resnet18", "attention": "softmax", "start": "paper"}
    },
    "condconv": {"peer": {"method": "condconv", "kernels": 2}},
    "dyconv": {"peer": {"method": "dyconv", "kernels": 2}},
    "odconv": {"peer": {"method": "odconv", "kernels": 2}},
    "odconv 1": {"peer": {"method": "odconv", "kernels": 1}},
    "fdconv": {"peer": {"method": "fdconv", "kernels": 8, "start": "paper"}},
    "kerneldna": {"peer": {"method": "kerneldna", "start": "paper"}},
}


@pytest.mark.parametrize("kind", breadth(MODELS, ["kw low rank", "odconv"]))
def test_temperature_is_folded(kind: str) -> None:
    """The folded network is the network at 0, and traces with batch and size open."""
    model = MODELS[kind]
    settings = {**SETTINGS["model"], "kernel_warehouse": None, **model}
    config = config_from_mapping({**SETTINGS, "model": settings})
    network = build_network(config.model)
    randomise(network, torch.randn(32, 3, 40, 40))
    network.eval()
    if has_temperature(network):
        kw.set_temperature(network, 0)
    inputs, _ = input_range(network, config.model, 40)
    assert inputs == InputRange(40, least=33)
    if "nonlocal_basis_ratio" not in str(model):  # one with its size open suffices
        inputs = replace(inputs, least=None)
    program = trace(Graph(network), inputs)
    kept = [*program.state_dict, *program.constants]
    assert not [name for name in kept if "temperature" in name or "one_hot" in name]
    is_open = inputs.least is not None and EXPORTS_OPEN_SIZES
    images = torch.randn(2, 3, 40, 57 if is_open else 40)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), network(images), atol=1e-4, rtol=1e-4)
    assert fold_temperature(network) is network


DEIT = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            {"name": "deit_tiny_patch16_224", "num_classes": 4, "timm_args": DEIT},
            "position embeddings",
        ),
        pytest.param(SETTINGS["model"], "open from 33 on", marks=pytest.mark.slow),
    ],
)
def test_a_network_of_one_size_is_exported_at_that_size(
    model: dict[str, Any], why: str, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "model": model, "data": {**SETTINGS["data"], "input_size": 32}}
    source = read_source(write_checkpoint(tmp_path / "best.pth", settings))
    written = export(source, tmp_path / "network.pt2", Options())
    assert written.input == InputRange(32, least=None)
    assert len(written.notes) == 1
    assert "32 x 32 only" in written.notes[0]
    assert why in written.notes[0]
    with pytest.raises(ValueError, match=r"the file takes \[B, 3, 32, 32\]"):
        kw.load(written.path)(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize(
    ("name", "side", "least", "why"),
    [
        ("dla46_c", 224, None, "it refuses 233 x 66"),  # sums of maps of unlike sizes
        ("inception_v3", 299, None, "it refuses 64 x 64"),  # kernels that do not fit
        # Several maps.
        ("crossvit_tiny_240", 240, 34 if EXPORTS_OPEN_SIZES else 64, ""),
    ],
)
def test_sizes_that_a_network_refuses_are_not_open(
    name: str, side: int, least: int | None, why: str
) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=4).eval()
    inputs, reason = input_range(network, ModelConfig(name, num_classes=4), side)
    assert (inputs.size, inputs.least, reason) == (side, least, why)


@pytest.mark.skipif(not EXPORTS_OPEN_SIZES, reason="an earlier version of torch")
def test_sizes_of_tensorflows_padding_have_no_maximum() -> None:
    """Each multiplied the time of tracing: an EfficientNet with open sizes was never done."""
    network = nn.Sequential(*(Conv2dSame(4, 4, 3, stride=2) for _ in range(3)), Conv2dSame(4, 4, 4))
    kw.convert(network, {"rules": [{"match": "[12]", "warehouse": "w"}]})
    network.num_features = 4
    graph = Graph(network.eval())
    traced = trace(graph, InputRange(32, channels=4, least=17))
    assert not [node for node in traced.graph.nodes if "max" in str(node.target)]
    images = torch.randn(2, 4, 35, 50)
    torch.testing.assert_close(traced.module()(images), graph(images))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_checkpoint(tmp_path_factory.mktemp("run") / "best.pth", SETTINGS)
    return read_source(path)


def test_source_is_the_average_at_temperature_0(source: Any) -> None:
    assert source.description.weights == "ema"
    assert source.description.metrics == {"top1": 20.0, "top5": 90.0}
    assert kw.get_temperature(source.network) == 0
    assert not source.network.training
    assert any("temperature 0.5" in note for note in source.notes)


@pytest.mark.parametrize(
    "precision", [pytest.param("fp16", marks=pytest.mark.slow), pytest.param("int8")]
)
def test_int8_and_half_agree_roughly(source: Any, precision: str, tmp_path: Path) -> None:
    """Verified, but not held to 1e-4; the files say what they are."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 40), np.uint8)) for _ in range(8)]
    options = Options(precision, 4, fixed_size=True)
    found = export(source, tmp_path / "net.onnx", options, images)
    assert found.real is not None
    assert found.real.images == 8
    graph = onnx.load(found.path).graph
    if precision == "fp16":
        assert 1e-5 < found.random.largest < 0.05
        assert onnx.TensorProto.FLOAT16 in {each.data_type for each in graph.initializer}
    else:
        assert 1e-4 < found.real.largest < 0.3
        assert any(node.op_type == "QuantizeLinear" for node in graph.node)
        _assert_dynamic_layers_are_stored_in_8_bits(graph, source.network)
    text = onnxruntime.InferenceSession(found.path).get_modelmeta().custom_metadata_map
    assert json.loads(text["input"])["precision"] == precision
    assert json.loads(text["classes"]) == CLASSES


def _assert_dynamic_layers_are_stored_in_8_bits(graph: Any, network: nn.Module) -> None:
    """Cells are within half a step of their rows; products with them are of float32."""
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    cells = {
        name: parameter.detach().numpy()
        for name, parameter in network.named_parameters()
        if name.endswith("warehouse.weight") and len(parameter) > 1
    }
    # Small constants are computed at export; their layers take the result.
    kept = [name for name in cells if f"network.{name}_int8" in stored]
    assert kept
    assert not any(f"network.{name}" in stored for name in kept)
    for name in kept:
        integers, scale = (stored[f"network.{name}_{part}"] for part in ("int8", "scale"))
        assert integers.dtype == np.int8
        step = np.abs(cells[name]).max(1, keepdims=True) / 127
        assert (np.abs(integers * scale - cells[name]) <= 0.501 * step).all()
    written = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert products
    assert all(written.get(each) != "DequantizeLinear" for node in products for each in node.input)


def test_exports_of_one_stem_leave_each_other_alone(source: Any, tmp_path: Path) -> None:
    """Another process may be writing ``net[1].onnx`` into the folder, or ``net1.pt2``."""
    target = tmp_path / "net[1].pt2"

    def write(job: Any) -> Path:
        for beside in (".onnx", ".bin", "-int8.onnx"):
            job.path.with_name(job.path.stem + beside).write_bytes(b"of this one")
        for name in ("net[1].onnx", "net1.pt2"):
            (tmp_path / f".{name}.partial{Path(name).suffix}").write_bytes(b"of another one")
        job.path.write_bytes(b"file")
        return job.path  # type: ignore[no-any-return]

    def load(_: Path) -> nn.Module:
        return source.network  # type: ignore[no-any-return]

    exporter = Exporter(write, load=load)
    with patch.dict(EXPORTERS.entries, {".pt2": exporter}):
        export(source, target, Options(), with_card=False)
    others = {".net[1].onnx.partial.onnx", ".net1.pt2.partial.pt2"}
    assert {path.name for path in tmp_path.iterdir()} == {"net[1].pt2", "net[1].bin", *others}


def test_an_onnx_file_is_run_where_it_is_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[Any] = []
    both = ["CPUExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)

    class Session:
        """Of a machine without CUDA's libraries: onnxruntime takes the CPU instead."""

        def __init__(self, *_: Any, providers: Any) -> None:
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return both[:1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(AttributeError, match="get_modelmeta"):
        OnnxNetwork(tmp_path / "net.onnx", "cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ExportError, match=r"cannot start its CUDAExecutionProvider.*use cpu"):
            OnnxNetwork(tmp_path / "net.onnx", device)
    assert asked == [[(both[0], {})], [(both[1], {})], [(both[1], {"device_id": "1"})]]
    with pytest.raises(ExportError, match=r"has no MPSExecutionProvider here.*use cpu"):
        OnnxNetwork(tmp_path / "net.onnx", "mps")


@pytest.mark.slow
def test_few_images_calibrate(source: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 40), np.uint8)) for _ in range(3)]
    options = Options("int8", fixed_size=True)
    written = export(source, tmp_path / "net.onnx", options, images, with_card=False)
    assert written.real is not None
    assert written.real.images == 3


def test_a_network_too_large_for_one_onnx_file_is_refused(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 1000)
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(ExportError, match=r"2 GiB at most .*fp16, as .pt2 or as .safetensors"):
        write_program(program, source.description, tmp_path / "net.onnx", False, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "shift"), [("fp32", 0.01), ("fp16", 100)])
def test_a_file_that_differs_is_not_left(
    source: Any, precision: str, shift: float, tmp_path: Path
) -> None:
    """A network that computes something else than the written file is found out; in less precision,
    where the difference is no rounding."""
    target = tmp_path / "net[1].safetensors"  # which is no pattern

    class Shifting(nn.Module):
        """Computes one thing and saves another."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(source.network)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {k: v + (k == "fc.bias") * shift for k, v in self.inner.state_dict().items()}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    shifting = Shifting()
    with pytest.raises(ExportError, match="differ from PyTorch's by"):
        export(replace(source, network=shifting), target, Options(precision))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        (
            "net.tflite",
            "fp32",
            r"net.tflite: expected a name that ends with .onnx, .xml, .pte, .pt2, .safet",
        ),
        ("net.onnx", "bf16", "fp32, fp16, int8, not in bf16"),
        ("net.pt2", "int8", "fp32, fp16, bf16, not in int8"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, precision: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_target(Path(name), Options(precision))


def test_too_few_real_images_are_refused(source: Any, tmp_path: Path) -> None:
    images = [torch.zeros(3, 40, 40, dtype=torch.uint8)] * 3
    with pytest.raises(ExportError, match="3 real images do not fill a batch of 4"):
        export(source, tmp_path / "net.onnx", Options(batch=4), images)
    assert not list(tmp_path.iterdir())


def test_a_format_that_cannot_be_read_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPORTERS, ".own", Exporter(lambda job: job.path))
    with pytest.raises(ExportError, match=r"exporter of .own files has no load.*Exporter.*load="):
        check_target(Path("net.own"), Options())


@pytest.mark.parametrize(
    ("plan", "size", "batch", "again"),
    [
        ("auto", 224, 4, False),
        # A rule of onnxscript's optimizer changes the result at a batch of two.
        pytest.param("resnet18", 40, 2, True, marks=pytest.mark.slow),
    ],
)
def test_the_tool_writes_all_formats_and_cards(
    plan: str, size: int, batch: int, again: bool, tmp_path: Path, tool: Any, capsys: Any
) -> None:
    config, settings = tmp_path / "tiny.yaml", copy.deepcopy(SETTINGS)
    settings["data"]["root"] = "/home/me/birds"
    if plan == "auto":
        settings["model"] |= {
            "name": "deit_tiny_patch16_224",
            "timm_args": {**DEIT, "img_size": size},
        }
        settings["model"]["kernel_warehouse"]["plan"] = plan
        settings["data"]["input_size"] = size
    config.write_text(json.dumps(settings))
    checkpoint = write_checkpoint(tmp_path / "best.pth", settings)
    targets = [tmp_path / "out" / f"tiny.{end}" for end in ("onnx", "pt2", "safetensors")]
    # Nothing open, which traces faster; what is open is tested above.
    tool("tools/export.py", config, checkpoint, *targets, "--batch", batch, "--fixed-size")
    out = tmp_path / "out"
    (weights,) = out.glob("tiny-????????.safetensors")
    files = [out / "tiny.onnx", out / "tiny.pt2", weights]
    assert sorted(out.iterdir()) == sorted(files + [f.with_name(f.name + ".md") for f in files])
    expected = read_source(checkpoint, config).network(torch.zeros(batch, 3, size, size))
    for file in files:
        for place in (str(Path(kw.__file__).parent), "/home/me"):  # whose machine it was
            assert place.encode() not in file.read_bytes()
        network = kw.load(file)
        torch.testing.assert_close(network(torch.zeros(batch, 3, size, size)), expected)
        card = file.with_name(file.name + ".md").read_text()
        assert str(tmp_path) not in card
        for words in ("# tiny", f"plan {plan}, cell_num_ratio 1", "20", "bird, cat", file.name):
            assert words in card
        parameters = sum(p.numel() for p in read_source(checkpoint).network.parameters())
        assert f"| parameters | {parameters:,} |" in card
    said = capsys.readouterr()
    assert "before annealing had ended" in said.err
    assert ("written without it" in "".join(said)) == again


def test_a_run_is_called_by_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "birds"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(SETTINGS))
    checkpoint = write_checkpoint(run / "best.pth", SETTINGS)
    for config in (None, run / "config.yaml"):
        assert read_source(checkpoint, config).description.model == "birds"
    assert name_of_config("configs/kw_resnet18_1x.yaml") == "kw_resnet18_1x"
