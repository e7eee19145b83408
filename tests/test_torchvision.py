"""torchvision's networks, converted with their weights; its names, wrappers and tools."""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from breadth import breadth
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import detection, get_model, list_models, quantization, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import kw
from kw.models import PAPER_MODELS
from kw.models.weights import CheckpointError, load_start
from kw.warehouse import KWLayer, find_warehouses

ROOT = Path(__file__).parents[1]
# One network a family, and the side of its images.
NETWORKS = {
    "alexnet": 80,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "vit_b_16": 224,
}
QUICK = ("googlenet", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0")


def lived_in(model: nn.Module) -> nn.Module:
    """Statistics and weights away from where they begin, so that all of them count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name in ("running_mean", "running_var", "weight", "bias"):
                value = getattr(module, name, None)
                if isinstance(value, torch.Tensor) and value.dim() == 1:
                    low = 0.5 if name in ("running_var", "weight") else -0.1
                    noise = torch.rand(value.shape, generator=generator)
                    value.copy_(low + noise * (1 if low > 0 else 0.2))
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


def network(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return lived_in(get_model(name, num_classes=10, **more, **settings))


def convert(model: nn.Module, *args: object, **settings: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is refused
        return kw.convert(model, *args, announce=False, **settings)


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def test_every_family_has_a_case() -> None:
    families = {torchvision.models.get_model_builder(n).__module__ for n in NETWORKS}
    known = {
        torchvision.models.get_model_builder(name).__module__
        for name in list_models(module=torchvision.models)
    }
    assert families == known


@pytest.mark.parametrize("name", breadth(NETWORKS, QUICK))
def test_a_converted_classifier_computes_the_same(name: str) -> None:
    model = network(name).eval()
    images = torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    with torch.no_grad():
        expected = model(images)
        convert(model, "auto")
        assert any(isinstance(module, KWLayer) for module in model.modules())
        assert deviation(model(images), expected) < 1e-5


@pytest.mark.parametrize("name", breadth(["googlenet", "inception_v3"], ["googlenet"]))
def test_further_outputs_in_training(name: str) -> None:
    """In float64: normalisation over two images amplifies what is rounded."""
    model, side = network(name).double().train(), {"inception_v3": 299}.get(name, 64)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    static = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="not called as a module when the network runs for evalu"):
        kw.convert(model, "auto", announce=False)
    found = []
    for network_ in (static, model):
        torch.manual_seed(2)  # dropout
        with torch.no_grad():
            found.append(network_(images))
    assert len(found[0]) > 1
    assert all(deviation(b, a) < 1e-9 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "name",
    breadth(
        ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"],
        ["lraspp_mobilenet_v3_large"],
    ),
)
def test_segmentation(name: str) -> None:
    aux = {} if "lraspp" in name else {"aux_loss": True}
    torch.manual_seed(0)
    model = getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=5, **aux
    ).eval()
    lived_in(model)
    images = torch.randn(2, 3, 65, 49)
    expected = model(images)
    convert(model, "auto")
    assert "backbone" in next(n for n, m in model.named_modules() if isinstance(m, KWLayer))
    found = model(images)
    assert found.keys() == expected.keys()
    assert all(deviation(found[key], expected[key]) < 1e-5 for key in expected)


def detector(kind: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, float] = {"min_size": 64, "max_size": 96}
    if kind == "frozen":
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
        )
        few = {f"rpn_post_nms_top_n_{mode}": 20 for mode in ("train", "test")}
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2)
        model = detection.FasterRCNN(
            backbone, num_classes=4, box_score_thresh=0.0, box_roi_pool=pool, **few, **size
        )
    else:
        build = getattr(detection, kind)
        if kind.startswith(("faster", "mask", "fcos")):  # so that it finds something
            size["box_score_thresh" if "rcnn" in kind else "score_thresh"] = 0.0
        model = build(weights=None, weights_backbone=None, num_classes=4, **size)
    return lived_in(model)


def targets() -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[4.0, 6, 40, 50], [20, 10, 48, 44]], dtype=torch.float64)
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[:, 10:40, 10:40] = 1
    return [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks} for _ in range(2)]


RANDOM = torch.Generator().manual_seed(1)  # with these images every detector finds something
IMAGES = [torch.rand(3, *size, generator=RANDOM) for size in ((60, 80), (70, 50), (49, 51))]
DETECTORS = [
    *("frozen", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
    "fcos_resnet50_fpn",
]


@pytest.mark.parametrize("kind", breadth(DETECTORS, ["frozen"]))
def test_a_detector_finds_the_same(kind: str) -> None:
    """On images of several sizes, and the same losses: its samples of boxes are drawn alike. In
    float64: what random networks round, their boxes and losses amplify."""
    model = detector(kind).double()
    several = [image.double() for image in IMAGES]
    same = [several[0]] * 2
    losses, detections = [], []
    for converted in (False, True):
        if converted:
            convert(model, "auto", several)
        with torch.no_grad():
            detections.append(model.eval()(several))
        torch.manual_seed(3)
        trained = copy.deepcopy(model).train()
        losses.append(trained(same, targets()))
    for before, after in zip(*detections, strict=True):
        assert torch.equal(before["labels"], after["labels"])
        assert len(before["labels"])
        for key in ("boxes", "scores"):
            assert deviation(after[key], before[key]) < 1e-9
    assert losses[0].keys() == losses[1].keys()
    for key in losses[0]:
        torch.testing.assert_close(losses[1][key], losses[0][key], rtol=1e-8, atol=1e-10)
    sum(losses[1].values()).backward()
    assert all(warehouse.cells.grad.any() for warehouse in find_warehouses(trained))


def test_a_detector_with_frozen_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """The layers of ``trainable_layers`` that are frozen stay so; frozen statistics have no
    successor in the attention branches; a state is loaded again."""
    model = detector("frozen")
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert any("layer1" in name for name in fixed)
    convert(model, "auto", IMAGES)
    assert fixed == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    kw.set_temperature(model, 0.5)
    other = convert(detector("frozen"), model.warehouses.plans[0], start="paper")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        pairs = zip(model.eval()(IMAGES), other.eval()(IMAGES), strict=True)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in pairs)

    body = detector("frozen").backbone.body
    with torch.no_grad():
        expected = body(torch.stack([IMAGES[0]] * 2))
        kw.convert(body, "resnet18", norm="layer")
        found = body(torch.stack([IMAGES[0]] * 2))
    assert list(body.warehouses) == ["layer1", "layer2", "layer3", "layer4"]
    assert all(deviation(found[key], expected[key]) < 1e-5 for key in expected)
    assert "4 layers were frozen and train now (layer1.0.conv1" in capsys.readouterr().err


def test_feature_extractors() -> None:
    """Of a converted network, which is traced; conversion of one; and torchvision's older way."""
    model, images = network("resnet18"), torch.randn(2, 3, 64, 64)
    wanted = {"layer2": "a", "layer4": "b"}
    static = create_feature_extractor(copy.deepcopy(model), wanted)
    expected = static.eval()(images)
    convert(model, "resnet18")
    assert "layer1.0.conv1" in get_graph_node_names(model)[1]
    traced = create_feature_extractor(copy.deepcopy(model), wanted)
    older = IntermediateLayerGetter(copy.deepcopy(model), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nodes that differ between the modes: batch counters
        convert(static, "auto")
    for features in (traced, older, static):
        found = features.eval()(images)
        assert all(deviation(found[key], expected[key]) < 1e-5 for key in expected)
    kw.set_temperature(traced, 0.5)
    kw.set_temperature(model, 0.5)
    other = torch.randn(3, 3, 96, 64)
    assert torch.equal(
        traced(other)["b"], IntermediateLayerGetter(model.eval(), {"layer4": "b"})(other)["b"]
    )
    sum(y.square().mean() for y in traced.train()(images).values()).backward()
    assert all(warehouse.cells.grad is not None for warehouse in find_warehouses(traced))


@pytest.mark.parametrize("method", ["dyconv", "odconv", "fdconv", "kerneldna"])
def test_peers_are_traced_too(method: str) -> None:
    model = kw.peers.convert(network("shufflenet_v2_x0_5"), method, announce=False).eval()
    images = torch.randn(2, 3, 64, 64)
    traced = create_feature_extractor(model, ["fc"])
    torch.testing.assert_close(traced(images)["fc"], model(images))


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_is_said() -> None:
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile KWConv2d"):
        torch.jit.script(convert(network("resnet18"), "resnet18"))
    for quantise in (False, True):
        model = quantization.shufflenet_v2_x0_5(weights=None, quantize=quantise)
        before = [type(module) for module in model.modules()]
        for convert_it in (kw.convert, kw.peers.convert):
            with pytest.raises(ValueError, match="written for quantisation in eager mode"):
                convert_it(model, "auto" if convert_it is kw.convert else "dyconv")
        assert [type(module) for module in model.modules()] == before


# --- the papers' models under torchvision's names -------------------------------------------------

PAPERS = {
    **dict.fromkeys(["kw_resnet18_1d4x", "kw_resnet18_1x", "kw_resnet18_4x"], "resnet18"),
    **dict.fromkeys(["kw_resnet50_1d2x", "kw_resnet50_1x"], "resnet50"),
    **{f"kw_mobilenetv2_100_{b}": "mobilenet_v2" for b in ("1d2x", "1x", "4x")},
    "kw_convnext_tiny_1x": "convnext_tiny",
}


@pytest.mark.parametrize(
    "name",
    breadth(PAPERS, [n for n in PAPERS if not n.endswith(("18_1d4x", "18_4x", "50_1x"))]),
)
def test_a_named_plan_gives_the_released_warehouses(name: str) -> None:
    released = PAPER_MODELS[name]
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), get_model(PAPERS[name])
        kw.convert(theirs, released.plan, **released.settings, announce=False)
    expected, found = (
        [(n, w.partition.cells, w.partition.cell_shape) for n, w in m.warehouses.items()]
        for m in (ours, theirs)
    )
    assert found == expected
    sizes = [[p.numel() for p in model.parameters()] for model in (ours, theirs)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", breadth(["mobilenetv2_050", "convnext_tiny"], ["mobilenetv2_050"]))
def test_our_weights_in_a_network_of_torchvision(name: str) -> None:
    released = PAPER_MODELS[f"kw_{name}_1x"]
    narrow = {"width_mult": 0.5} if "mobile" in name else {}
    torchvisions = "mobilenet_v2" if "mobile" in name else name
    images = torch.randn(2, 3, 64, 64)
    for converted in (False, True):
        torch.manual_seed(0)
        source = timm.create_model(f"kw_{name}_1x" if converted else name)
        lived_in(source).eval()
        model = get_model(torchvisions, **narrow).eval()
        if converted:
            kw.set_temperature(source, 0.5)
            convert(model, released.plan, start="paper")
        load_start(model, source.state_dict(), "best.pth")
        assert deviation(model(images), source(images)) < 1e-5
    with pytest.raises(CheckpointError, match="is of another model"):
        load_start(model, timm.create_model("mobilenetv2_100").state_dict(), "other.pth")


def test_distributed(tmp_path: Path) -> None:
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = convert(network("shufflenet_v2_x0_5"), "auto")
        parallel = DistributedDataParallel(model)
        kw.set_temperature(parallel, 0.25)
        parallel(torch.randn(2, 3, 64, 64)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert kw.get_temperature(model) == 0.25
    finally:
        destroy_process_group()


def test_the_example_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It anneals network and average alike, writes what a plan needs, and goes on."""
    main = runpy.run_path(str(ROOT / "examples/torchvision_loop.py"))["main"]
    file = tmp_path / "last.pth"
    small = ["--model", "shufflenet_v2_x0_5", "--images", "64", "--anneal", "2", "--out", str(file)]
    for epochs, tau in ((1, 0.75), (2, 0.25)):
        main([*small, "--epochs", str(epochs), *(["--resume", str(file)] if epochs > 1 else [])])
        saved = torch.load(file, weights_only=True)
        assert saved["epoch"] == epochs
        for part in ("model", "average"):
            state = saved[part]
            assert {float(v) for k, v in state.items() if k.endswith("temperature")} == {tau}
    assert "epoch 1: loss" in (printed := capsys.readouterr().out)
    found = main([*small, "--epochs", "2", "--resume", str(file)])  # nothing is left to train
    assert printed.endswith(f"accuracy of the average {found:.1%}\n")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["static", "paper"])
def test_the_example_learns(start: str, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples/torchvision_loop.py"))["main"]
    more = ["--anneal", "1"]
    if start == "static":
        torch.save(network_of_four().state_dict(), tmp_path / "static.pth")
        more = ["--weights", str(tmp_path / "static.pth")]
    assert main(["--epochs", "2" if start == "static" else "4", *more]) > 0.8


def network_of_four() -> nn.Module:
    torch.manual_seed(0)
    return get_model("resnet18", num_classes=4)
