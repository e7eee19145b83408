"""Classifiers as backbones: whole, strictly loaded, frozen and slowed by where layers stand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import breadth
from torch import nn

import kw
from kw.config import ConfigError
from kw.detection.backbone import Backbone
from kw.models import build_network
from kw.models.depth import decayed_rates, frozen_parameters, parameter_places
from kw.training import CheckpointError
from kw.warehouse import KWLayer

IMAGENET = Path(__file__).parents[1] / "configs" / "imagenet"
NARROW = {
    "resnet18": {"channels": [8, 8, 16, 16]},
    "resnet50": {"channels": [8, 8, 16, 16]},
    "mobilenetv2_100": {},
    "convnext_tiny": {"dims": [8, 16, 24, 32], "depths": [3, 3, 9, 3]},
    "deit_tiny_patch16_224": {"embed_dim": 48, "dynamic_img_size": True, "dynamic_img_pad": True},
}
PLANS = {"mobilenetv2_100": "mobilenetv2_4x", "deit_tiny_patch16_224": "deit"}


def network(name: str, converted: bool = True) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": name, "num_classes": 5, "timm_args": NARROW[name]}
    if converted:
        settings["kernel_warehouse"] = {"plan": PLANS.get(name, name), "start": "paper"}
    return settings


CASES = {
    f"{name}-{'kw' if converted else 'static'}": network(name, converted)
    for name in NARROW
    for converted in (False, True)
}
CASES["resnet18-odconv"] = {**network("resnet18", False), "peer": {"method": "odconv"}}


@pytest.fixture(
    params=breadth(CASES, [name for name in CASES if name[-7:] != "-static" or "resnet18" in name])
)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def test_a_swin_takes_images_of_any_size_if_it_is_told_to() -> None:
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    name = "swin_tiny_patch4_window7_224"
    with pytest.raises(ConfigError, match=r"a Swin with \{strict_img_size: false\}"):
        Backbone({"name": name, "timm_args": sizes})
    backbone = Backbone({"name": name, "timm_args": {**sizes, "strict_img_size": False}})
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(16 << i, 24 >> i, 16 >> i) for i in range(4)]
    assert backbone.strides == [4, 8, 16, 32]


def test_networks_without_drop_path_take_no_rate_of_it() -> None:
    settings = {"name": "repvit_m0_9", "num_classes": 3}
    assert Backbone(settings).strides == [4, 8, 16, 32]
    with pytest.raises(ConfigError, match="unexpected keyword argument 'drop_path_rate'"):
        Backbone(settings, drop_path_rate=0.1)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'distilation'"):
        Backbone({**settings, "timm_args": {"distilation": False}})


def test_maps_are_those_of_the_classifier(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of any image size, at batch 1, with weights of a checkpoint of other classes."""
    torch.manual_seed(0)
    config = kw.config.config_from_mapping(
        {
            "model": {**settings, "num_classes": 7},
            "data": {"root": "."},
            "optimizer": {"lr": 0.1},
            "epochs": 1,
            "total_batch_size": 1,
            "batch_size": 1,
        }
    )
    classifier: Any = build_network(config.model).eval()
    path = tmp_path / "best.pth"
    torch.save({"state_dict": classifier.state_dict()}, path)
    backbone = Backbone(settings, weights=str(path)).eval()
    for images in (torch.randn(1, 3, 75, 101), torch.randn(2, 3, 64, 96)):
        expected = classifier.forward_intermediates(images, intermediates_only=True)
        maps = backbone(images)
        assert [m.shape[1] for m in maps] == backbone.out_channels
        for found, whole in zip(maps, expected[-len(maps) :], strict=True):
            torch.testing.assert_close(found, whole)
        for found, stride in zip(maps, backbone.strides, strict=True):
            assert abs(images.shape[-1] / stride - found.shape[-1]) <= 1


def test_every_parameter_gets_a_gradient(settings: dict[str, Any]) -> None:
    backbone = Backbone(settings, frozen_stages=0, norm_eval=True)
    sum(m.square().sum() for m in backbone(torch.randn(2, 3, 70, 70))).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not all(p.requires_grad for p in backbone.parameters())
    assert backbone.training
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)


def test_checkpointing_changes_nothing(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = Backbone(settings)
    frugal = Backbone(settings, grad_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for backbone in (plain, frugal):
        sum(m.square().mean() for m in backbone(images)).backward()
    gradients = dict(frugal.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    buffers = dict(frugal.named_buffers())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-6, atol=1e-6)


def test_the_map_of_mobilenets_last_convolution() -> None:
    backbone = Backbone(network("mobilenetv2_100"), out_indices=(1, 2, 3, 5))
    assert backbone.out_channels == [24, 32, 96, 1280]
    assert backbone.strides == [4, 8, 16, 32]


def users(model: nn.Module) -> dict[str, list[str]]:
    """The layers of every warehouse's cells, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, KWLayer):
            found.setdefault(names[id(layer.warehouse.cells)], []).append(name)
    return found


def test_a_warehouse_freezes_with_its_last_user() -> None:
    """The first stage hands its warehouse over to the second's first block."""
    model = Backbone(network("resnet18")).network
    one, two = frozen_parameters(model, 1), frozen_parameters(model, 2)
    shared = {
        cells: names
        for cells, names in users(model).items()
        if {"layer1.0.conv1", "layer2.0.conv1"} <= set(names)
    }
    assert len(shared) == 1
    for cells in shared:
        assert cells not in one
        assert cells in two
    for stages, frozen in ((1, one), (2, two)):
        for cells, names in users(model).items():
            assert (cells in frozen) == all(int(name[5]) <= stages for name in names)
        for name, _ in model.named_parameters():
            if name.startswith("layer") and ".warehouse." not in name:
                assert (name in frozen) == (int(name[5]) <= stages), name
    assert {"conv1.weight", "bn1.weight", "bn1.bias"} <= one
    assert not frozen_parameters(model, -1)
    with pytest.raises(ValueError, match="the network has 4 stages"):
        frozen_parameters(model, 9)


def test_frozen_statistics_stay() -> None:
    backbone = Backbone(network("resnet18"), frozen_stages=1)
    before = copy.deepcopy(backbone.state_dict())
    backbone(torch.randn(4, 3, 64, 64))
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert any(key.startswith("network.layer2") for key in moved)
    assert not [key for key in moved if key.startswith(("network.bn1", "network.layer1"))]


def test_rates_fall_towards_the_stem() -> None:
    """ConvNeXt-Tiny's groups as published: stem, two stages, a third of three, the last."""
    model = Backbone(network("convnext_tiny")).network
    rates = decayed_rates(model, 0.5, 3)
    expected = {"stem.1.weight": 7, "stages.0.blocks.2.norm.weight": 6}
    expected |= {"stages.1.blocks.0.norm.weight": 5, "stages.1.downsample.0.weight": 5}
    expected |= {f"stages.2.blocks.{i}.norm.weight": 4 - i // 3 for i in range(9)}
    expected |= {"stages.3.blocks.1.norm.weight": 1, "stages.3.downsample.0.weight": 1}
    for name, power in expected.items():
        assert rates[name] == 0.5**power, name
    places = parameter_places(model)
    for cells, names in users(model).items():
        own = [p for n, p in places.items() if n.startswith(tuple(f"{u}." for u in names))]
        assert places[cells] == max(own)
        assert rates[cells] == max(rates[n] for n in rates if n.startswith(names[-1] + "."))


def test_weights_fit_or_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = build_network(kw.detection.backbone.read_network(network("resnet18")))
    state = whole.state_dict()
    average = {
        key: value + 1 if value.is_floating_point() else value for key, value in state.items()
    }
    path = tmp_path / "best.pth"
    torch.save({"state_dict": state, "ema_state_dict": average}, path)
    backbone = Backbone(network("resnet18"), weights=str(path))
    own = backbone.network.state_dict()
    torch.testing.assert_close(own["conv1.weight"], average["conv1.weight"])
    assert {k for k in average if k not in own} == {"fc.weight", "fc.bias"}
    assert kw.get_temperature(backbone) == 0
    assert f"weights {path}: was written at temperature 1, bef" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"another model"):
        Backbone(network("resnet18", converted=False), weights=str(path))
    with pytest.raises(CheckpointError, match="no such file"):
        Backbone(network("resnet18"), weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_indices": (1, 9)}, "no map 9; it has 0: 64@2, 1: 8@4"),
        ({"out_indices": (2, 1)}, "rising order"),
        ({"frozen_stages": 7}, "frozen_stages"),
        ({"network": {"name": "resnet18", "timm_arg": {}}}, "timm_arg"),
        ({"network": {"name": "resnet_18"}}, "resnet_18"),
        ({"network": str(IMAGENET / "resnet18" / "none.yaml")}, "no such file"),
        ({"network": {"name": "deit_tiny_patch16_224"}}, "dynamic_img_size"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(**{"network": network("resnet18"), **changes})
