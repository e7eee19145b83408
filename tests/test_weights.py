"""Trained weights that a run starts from: which files, what is replaced, what is refused."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from breadth import breadth
from safetensors.torch import save_file
from torch import nn

import kw
from kw.config import ConfigError, config_from_mapping
from kw.models import start_network
from kw.models.build import say_other_pixels
from kw.models.freezing import hold_frozen
from kw.models.weights import CheckpointError, load_start, read_weights
from kw.training import train

NARROW = {"name": "resnet18", "num_classes": 5, "timm_args": {"channels": [8, 16, 16, 32]}}
DYNAMIC = {"plan": "resnet18", "cell_num_ratio": 2}


def static(seed: int = 1, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet18", channels=[8, 16, 16, 32], num_classes=classes).eval()


def config(**model: Any) -> Any:
    settings = {"optimizer": {"lr": 1.0}, "epochs": 1, "total_batch_size": 2, "batch_size": 2}
    return config_from_mapping({"model": {**NARROW, **model}, "data": {"root": "x"}, **settings})


def started(path: Path, **model: Any) -> nn.Module:
    return start_network(config(weights=str(path), **model).model).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


# --- files that are read ---------------------------------------------------------------------


def other(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value + 1 for key, value in state.items()}


FILES = {
    "tensors at the top": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "timm's trainer": lambda state: {"state_dict": other(state), "state_dict_ema": state},
    "this project": lambda state: {"state_dict": other(state), "ema_state_dict": state, "meta": {}},
    "torchvision's trainer": lambda state: {"model": state, "optimizer": {}, "epoch": 3},
    "wrapped": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled and wrapped": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "torch's average": lambda state: {
        "model": other(state),
        "model_ema": {
            **{f"module.{key}": value for key, value in state.items()},
            "n_averaged": torch.tensor(3),
        },
    },
    "before batches were counted": lambda state: {
        key: value for key, value in state.items() if "num_batches" not in key
    },
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
@pytest.mark.parametrize("dynamic", [None, DYNAMIC, {**DYNAMIC, "start": "paper"}])
def test_files(make: Any, dynamic: Any, tmp_path: Path) -> None:
    model = static()
    torch.save(make(model.state_dict()), tmp_path / "weights.pth")
    network = started(tmp_path / "weights.pth", kernel_warehouse=dynamic)
    kept = dynamic is None or dynamic.get("start") != "paper"
    assert close(logits(network), logits(model)) == kept


def test_safetensors(tmp_path: Path) -> None:
    model = static()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert close(
        logits(started(tmp_path / "weights.safetensors", kernel_warehouse=DYNAMIC)), logits(model)
    )


@pytest.mark.parametrize("method", ["condconv", "dyconv", "odconv"])
def test_peers_start_from_static_weights(method: str, tmp_path: Path) -> None:
    model = static()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = started(tmp_path / "weights.pth", peer={"method": method, "kernels": 3})
    assert close(logits(network), logits(model))


def test_converted_weights_go_into_the_converted_network(tmp_path: Path) -> None:
    trained = kw.convert(static(), "resnet18", cell_num_ratio=2, start="paper")
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
    network = started(tmp_path / "weights.pth", kernel_warehouse=DYNAMIC)
    assert torch.equal(logits(network), logits(trained))
    with pytest.raises(ConfigError, match=r"of a converted network.*set model.kernel_warehouse"):
        started(tmp_path / "weights.pth")


TORCHVISION = {
    "resnet18": ("resnet18", {}),
    "mobilenet_v2": ("mobilenetv2_100", {"plan": "mobilenetv2_1x"}),
    "convnext_tiny": ("convnext_tiny", {"plan": "convnext_tiny"}),
}


@pytest.mark.parametrize(
    "name", breadth(TORCHVISION, [n for n in TORCHVISION if "convnext" not in n])
)
@pytest.mark.parametrize("classes", [1000, 7])
def test_torchvision(name: str, classes: int, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "kw")
    torch.manual_seed(0)
    theirs: Any = getattr(torchvision.models, name)().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
        if hasattr(module, "layer_scale"):
            nn.init.normal_(module.layer_scale, std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours, dynamic = TORCHVISION[name]
    settings: dict[str, Any] = {"kernel_warehouse": dynamic} if dynamic else {}
    network: Any = start_network(
        config(
            name=ours,
            timm_args={},
            num_classes=classes,
            weights=str(tmp_path / "weights.pth"),
            **settings,
        ).model
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    if classes == 1000:
        assert close(network(x), theirs(x))
    else:
        assert "the classifier (" in caplog.text
        assert network(x).shape == (2, 7)
        first = next(p for p in theirs.parameters() if p.dim() == 4)
        if not dynamic:
            assert torch.equal(network.conv1.weight, first)


def test_timms_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def hub(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            asked.append(name)
            torch.manual_seed(1)
        return create(name.partition(".")[0], **kwargs)

    monkeypatch.setattr(timm, "create_model", hub)
    for source, name in (("timm", "resnet18"), ("timm:a1_in1k", "resnet18.a1_in1k")):
        network = start_network(config(weights=source, kernel_warehouse=DYNAMIC).model).eval()
        expected = static(classes=1000)
        assert asked.pop() == name
        features = torch.randn(2, 3, 32, 32)
        found: Any = network
        want: Any = expected
        assert close(found.forward_features(features), want.forward_features(features))

    def offline(*args: Any, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise OSError("no route to the hub")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"'timm'.*no route to the hub.*give a file"):
        start_network(config(weights="timm").model)


# --- what is replaced, and said --------------------------------------------------------------


def test_a_classifier_of_another_width_is_replaced_and_said(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "kw")
    model: Any = static(classes=9)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network: Any = started(tmp_path / "weights.pth", kernel_warehouse=DYNAMIC)
    (line,) = [r.message for r in caplog.records if "classifier" in r.message]
    assert "fc.weight [5, 32] ([9, 32] in the weights)" in line
    assert network.fc.weight.shape == (5, 32)
    x = torch.randn(2, 3, 32, 32)
    assert close(network.forward_features(x), model.forward_features(x))


def test_the_average_that_is_taken_is_said(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "kw")
    state = static().state_dict()
    torch.save({"state_dict": state, "ema_state_dict": state}, tmp_path / "weights.pth")
    started(tmp_path / "weights.pth")
    assert "moving average ('ema_state_dict')" in caplog.text


@pytest.mark.parametrize(
    ("weights", "known", "is_said"),
    [
        ("timm", 0.5, True),
        ("timm:a1_in1k", 0.5, True),
        ("timm", None, False),
        ("file.pth", 0.5, False),
        ("hf-hub:me/tiny", 0.5, False),
    ],
)
def test_timms_weights_on_other_pixels_are_said(
    weights: str, known: float | None, is_said: bool, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some of timm's weights, such as ViT's, the mean is not ImageNet's."""
    caplog.set_level(logging.INFO, "kw")
    cfg = timm.get_pretrained_cfg("resnet18")
    if known is not None:
        cfg = dataclasses.replace(cfg, mean=(known,) * 3, std=(known,) * 3)
    found = {"resnet18": cfg, "resnet18.a1_in1k": cfg}  # timm refuses other tags, too
    monkeypatch.setattr(timm, "get_pretrained_cfg", found.__getitem__)
    run = config(weights=weights)
    say_other_pixels(run.model, run.data.mean, run.data.std)
    said = f"model.weights {weights}: trained with data.mean [0.5, 0.5, 0.5] and data.std [0.5, "
    assert (said in caplog.text) is is_said
    assert is_said or not caplog.text


def test_mmengine_has_the_average_under_the_other_name(tmp_path: Path) -> None:
    """Its hook exchanges the two: https://github.com/open-mmlab/mmengine/pull/266"""
    hooks = pytest.importorskip("mmengine.hooks", reason="needs mmengine")
    from mmengine.model import ExponentialMovingAverage

    average = static(seed=2)
    content = {
        "state_dict": static().state_dict(),
        "ema_state_dict": ExponentialMovingAverage(average).state_dict(),
    }
    hooks.EMAHook()._swap_ema_state_dict(content)
    torch.save(content, tmp_path / "weights.pth")
    assert close(logits(started(tmp_path / "weights.pth")), logits(average))


# --- what is refused -------------------------------------------------------------------------


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: without(s, "layer1.0.conv1.weight"), "missing layer1.0.conv1.weight"),
        (lambda s: {**s, "neck.weight": torch.zeros(1)}, "unexpected neck.weight"),
        (
            lambda s: {**s, "bn1.weight": torch.zeros(3)},
            r"bn1.weight is \[3\], the model's is \[64\]",
        ),
        (lambda s: {"epoch": 3, "arch": "resnet18"}, "expected tensors by name.*'epoch', 'arch'"),
        (lambda s: [1, 2], "found a list"),
        (
            lambda s: {"state_dict": s, "args": argparse.Namespace()},
            "objects of argparse.Namespace, and reading",
        ),
        (lambda s: {**s, "version": 3}, "1 entries are no tensors: version"),
    ],
)
def test_files_that_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    torch.save(make(static().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=f"weights.pth.*(\n.*)*{message}"):
        started(tmp_path / "weights.pth", kernel_warehouse=DYNAMIC)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(path)
    state = static().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(path)


def test_torchvisions_other_networks_are_refused(tmp_path: Path) -> None:
    """MobileNetV3's tensors have timm's shapes and order, but its BatchNorm another epsilon."""
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"missing conv_stem\.weight"):
        start_network(config(name="mobilenetv3_small_100", timm_args={}, weights=str(path)).model)


@pytest.mark.parametrize("name", ["ghostnet_050", "hrnet_w18_small"])
def test_networks_that_take_no_drop_path(name: str) -> None:
    """Many of timm's families; they say so in two ways."""
    settings = {"name": name, "timm_args": {}, "kernel_warehouse": {"plan": "auto"}}
    with torch.device("meta"):
        network = start_network(config(**settings).model)
    assert network(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)
    with pytest.raises(ConfigError, match="drop_path_rate"):
        start_network(config(**settings, drop_path_rate=0.1).model)


def test_drop_path_of_a_class_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(torchvision.ops.StochasticDepth(0.1, "row"))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: network)
    settings = config(kernel_warehouse=None, drop_path_rate=0.1, drop_path_decay="linear")
    assert start_network(settings.model) is network


def test_a_network_without_a_classifier_leaves_the_files(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "kw")
    torch.save(static().state_dict(), tmp_path / "static.pth")
    torch.manual_seed(0)
    headless = timm.create_model("resnet18", channels=[8, 16, 16, 32], num_classes=0)
    load_start(headless, read_weights(tmp_path / "static.pth"), "static.pth")
    assert "its classifier is not used" in caplog.text
    assert torch.equal(headless.conv1.weight, static().conv1.weight)


def test_a_converted_classifier_of_other_classes_begins_held(tmp_path: Path) -> None:
    """Its warehouse is found by its layers, whatever its name."""
    rules = [
        {"match": r"layer\d.*conv\d", "warehouse": "body"},
        {"match": "fc", "warehouse": "end"},
    ]
    dynamic = {"plan": {"rules": rules}}
    trained = start_network(config(kernel_warehouse={**dynamic, "start": "paper"}).model)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    network: Any = start_network(
        config(num_classes=7, kernel_warehouse=dynamic, weights=str(tmp_path / "weights.pth")).model
    )
    assert not network.fc.attention.fc2.weight.any()
    branch = "layer1.0.conv1.attention.fc2.weight"
    assert torch.equal(network.state_dict()[branch], trained.state_dict()[branch])


# --- freezing --------------------------------------------------------------------------------


def trains(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_freezing(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "kw")
    dynamic = {"plan": "resnet18"}
    network = start_network(
        config(kernel_warehouse=dynamic, freeze=["conv1", "bn1", r"layer[12]", r".*\.bn2"]).model
    )
    left = trains(network)
    outside = {name for name in left if ".warehouse." not in name}
    assert not any(name.startswith(("conv1", "bn1", "layer1", "layer2")) for name in outside)
    assert not any(".bn2." in name for name in left)
    assert "layer3.0.conv2.attention.fc1.weight" in left
    # layer1's cells are layer1's alone; of layer2's, layer3's first convolutions use some.
    assert "layer2.0.conv2.warehouse.weight" in left
    assert "layer2.0.conv2.warehouse.weight (3 of its 5 layers)" in caplog.text
    # Dropout of layer2 is off all the same.
    hold_frozen(network.train())
    assert (network.layer2[0].training, network.layer3[0].training) == (False, True)
    branches = start_network(config(kernel_warehouse=dynamic, freeze=[r".*\.attention"]).model)
    assert sum(name.endswith(".warehouse.weight") for name in trains(branches)) == 4
    cells = start_network(config(kernel_warehouse=dynamic, freeze=[r".*\.warehouse"]).model)
    assert trains(cells) == {n for n, _ in cells.named_parameters() if ".warehouse." not in n}
    alone = start_network(config(kernel_warehouse=dynamic, freeze=[r"layer[1234]"]).model)
    assert not any(".warehouse." in name for name in trains(alone))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layer9"], "matches nothing; nearest: 'layer"),
        (["layer(1"], "no regular expression"),
        ([".*"], "nothing is left to train"),
    ],
)
def test_freezing_that_cannot_be(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start_network(config(freeze=patterns).model)


def test_a_run_from_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    """Frozen parts, BatchNorm's statistics too, stay as they were; resuming needs no weights."""
    settings = copy.deepcopy(settings)
    classes, weights = settings["model"]["num_classes"], tmp_path / "weights.pth"
    torch.save(static(classes=classes + 1).state_dict(), weights)
    settings["model"].update(NARROW | {"num_classes": classes}, weights=str(weights))
    settings["model"].update(kernel_warehouse=DYNAMIC, freeze=["conv1", "bn1", "layer1"])
    settings.update(epochs=1, temperature_epochs=0)
    train(config_from_mapping(settings), tmp_path / "run")
    before = torch.load(weights, weights_only=True)
    after = torch.load(tmp_path / "run/last.pth", weights_only=True)["state_dict"]
    for key in ("conv1.weight", "bn1.running_mean", "bn1.num_batches_tracked"):
        assert torch.equal(after[key], before[key]), key
    assert not torch.equal(after["layer4.1.bn2.running_mean"], before["layer4.1.bn2.running_mean"])
    weights.unlink()
    settings.update(epochs=2)
    train(config_from_mapping(settings), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="no such file"):
        train(config_from_mapping(settings), tmp_path / "another")
