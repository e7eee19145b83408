"""The papers' models through timm: names, features, weights from a file."""

from __future__ import annotations

import copy
import functools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from breadth import breadth

import kw
from kw.errors import UserError
from kw.models import PAPER_MODELS
from kw.warehouse import find_warehouses
from kw.warehouse.attention import KernelAttention

SMALL = "kw_resnet18_1d4x"
NARROW: dict[str, object] = {"channels": [8, 16, 24, 32]}  # of a ResNet18: its layers, not its size
# One a family; the third converts its classifier.
FAMILIES = [SMALL, "kw_resnet50_1x", "kw_mobilenetv2_050_1d2x", "kw_convnext_tiny_1x"]


def test_names() -> None:
    assert timm.list_models("kw_*") == kw.list_models() == sorted(PAPER_MODELS)
    assert kw.list_models("kw_resnet50_*") == [f"kw_resnet50_{b}" for b in ("1d2x", "1x", "4x")]
    assert timm.list_models("kw_*", pretrained=True) == []
    assert all(timm.get_pretrained_cfg(name).first_conv for name in PAPER_MODELS)


@pytest.mark.slow  # kw first: tests/test_convert.py
def test_timm_may_be_imported_first() -> None:
    code = (
        "import timm, kw, torch, sys\n"
        "assert 'mmengine' not in sys.modules\n"
        "with torch.device('meta'):\n"
        "    print(type(timm.create_model('kw_resnet18_1d4x', num_classes=10)).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "ResNet"


@functools.cache
def class_of(backbone: str) -> type:
    with torch.device("meta"):
        return type(timm.create_model(backbone))


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_create(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, drop_rate=0.1)
        expected = kw.convert(
            timm.create_model(PAPER_MODELS[name].backbone, num_classes=10),
            PAPER_MODELS[name].plan,
            **PAPER_MODELS[name].settings,
        )
    assert type(model) is class_of(PAPER_MODELS[name].backbone)
    assert model.num_classes == 10
    shapes = {key: tensor.shape for key, tensor in expected.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert model.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize(
    "name", breadth([*FAMILIES, "kw_deit_tiny_1x"], [SMALL, FAMILIES[2], "kw_deit_tiny_1x"])
)
def test_features_only(name: str) -> None:
    """The static network's features, by shape; all cells are registered, none is without use."""
    size = {"img_size": 64} if "deit" in name else NARROW if name == SMALL else {}
    model = timm.create_model(name, features_only=True, **size)
    static = timm.create_model(PAPER_MODELS[name].backbone, features_only=True, **size)
    images = torch.randn(2, 3, 64, 64)
    features = model(images)
    assert [f.shape for f in features] == [f.shape for f in static(images)]
    assert model.feature_info.channels() == static.feature_info.channels()
    registered = {id(parameter) for parameter in model.parameters()}
    assert all(id(warehouse.cells) in registered for warehouse in find_warehouses(model))
    kw.set_temperature(model, 0.5)
    sum(f.square().mean() for f in model(images)).backward()
    assert all(w.cells.grad is not None for w in find_warehouses(model))


def test_features_of_early_stages_drop_the_late_warehouses() -> None:
    model = timm.create_model(SMALL, features_only=True, out_indices=(1, 2), **NARROW)
    assert list(model.model.warehouses) == ["layer1", "layer2"]
    assert [f.shape[1] for f in model(torch.randn(1, 3, 64, 64))] == [8, 16]


@pytest.mark.parametrize("wrapper", ["list", "hook"])
def test_feature_wrappers_that_take_layers_out_of_the_network(wrapper: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    expected = timm.create_model(SMALL, features_only=True, **NARROW).eval()(images)
    torch.manual_seed(0)
    model = timm.create_model(SMALL, features_only=True, feature_cls=wrapper, **NARROW).eval()
    torch.testing.assert_close(model(images), expected)


# Weights from a file


def disturbed(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(name, **settings).eval()
    for module in model.modules():
        if isinstance(module, KernelAttention):
            module.reset_parameters()  # at random: every weight counts
    kw.set_temperature(model, 0.25)
    return model


@pytest.mark.parametrize("wrapped", [False, True], ids=["weights", "checkpoint"])
@pytest.mark.parametrize("way", ["overlay", "checkpoint_path"])
def test_weights_from_a_file(way: str, wrapped: bool, tmp_path: Path) -> None:
    trained, path = disturbed(SMALL, **NARROW), tmp_path / "best.pth"
    state = trained.state_dict()
    torch.save({"state_dict": state, "meta": {"epoch": 3}} if wrapped else state, path)
    if way == "overlay":
        overlay = {"file": str(path)}
        model = timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=overlay, **NARROW)
    else:
        model = timm.create_model(SMALL, checkpoint_path=path, **NARROW)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), trained(images))
    assert kw.get_temperature(model) == 0.25


@pytest.mark.parametrize("name", [SMALL, "kw_mobilenetv2_050_1d2x"])
@pytest.mark.parametrize("settings", [{"num_classes": 5}, {"features_only": True}], ids=str)
def test_finetuning_keeps_all_but_the_classifier(
    name: str, settings: dict[str, object], tmp_path: Path
) -> None:
    narrow = NARROW if name == SMALL else {}
    state, path = disturbed(name, **narrow).state_dict(), tmp_path / "best.pth"
    torch.save(state, path)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **settings, **narrow
    )
    compared = 0
    for key, tensor in model.state_dict().items():
        key = key.removeprefix("model.")
        if not key.startswith(("fc.", "classifier.")):
            torch.testing.assert_close(tensor, state[key], rtol=0, atol=0)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("settings", [{}, {"num_classes": 5}, {"features_only": True}], ids=str)
@pytest.mark.parametrize("other", ["resnet34", "kw_resnet18_1d2x"])
def test_weights_of_another_model_are_refused(
    other: str, settings: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(timm.create_model(other, **NARROW).state_dict(), path)
    settings = {**settings, **NARROW, "pretrained_cfg_overlay": {"file": str(path)}}
    # A file of the static network, or of a converted one.
    with pytest.raises(UserError, match=r"is of another model .*\n  "):
        timm.create_model(SMALL, pretrained=True, **settings)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("classes", [3, 5, 0, 1000])
def test_a_run_of_three_classes_is_loaded_for_others(
    classes: int, channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its classifier where it fits; one of other classes is fresh, and said to be."""
    caplog.set_level(logging.INFO, "kw")
    narrow = {"channels": [8, 8, 16, 16], "in_chans": channels}
    trained, path = disturbed(SMALL, num_classes=3, **narrow), tmp_path / "best.pth"
    torch.save({"state_dict": trained.state_dict(), "meta": {"epoch": 1}}, path)
    caplog.clear()
    overlay = {"file": str(path)}
    model = timm.create_model(
        SMALL, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **narrow
    ).eval()
    x = torch.randn(2, channels, 64, 64)
    features, expected = model.forward_features(x), trained.forward_features(x)
    torch.testing.assert_close(features, expected)
    if classes == 3:
        torch.testing.assert_close(model(x), trained(x))
        assert not caplog.text
    else:
        assert ("classifier is not used" if classes == 0 else "small random") in caplog.text
    if classes > 3:
        assert not model.get_classifier().bias.any()
        assert 0 < model.get_classifier().weight.std() < 0.02


@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize("channels", [3, 1])
def test_static_weights_are_kept(
    classes: int, channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From a file of the static network; the classifier of other classes is replaced and said."""
    caplog.set_level(logging.INFO, "kw")
    torch.manual_seed(0)
    static = timm.create_model("resnet18", **NARROW).eval()
    torch.save(static.state_dict(), tmp_path / "static.pth")
    overlay = {"file": str(tmp_path / "static.pth")}
    settings: dict[str, object] = {"num_classes": classes, "in_chans": channels, **NARROW}
    model = timm.create_model(
        "kw_resnet18_1x", pretrained=True, pretrained_cfg_overlay=overlay, **settings
    ).eval()
    x = torch.randn(2, channels, 64, 64)
    found = model.forward_features(x)
    expected = static.forward_features(x.expand(-1, 3, -1, -1) if channels == 1 else x)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert ("starts from small random weights" in caplog.text) == (classes != 1000)


def test_pretrained_takes_timms_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the static network, by timm's own way."""
    caplog.set_level(logging.INFO, "kw")
    create = timm.create_model
    asked = []

    def hub(name: str, pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        if pretrained and not name.startswith("kw_"):
            asked.append((name, kwargs.get("cache_dir")))
            pretrained = False
            torch.manual_seed(5)
        return create(name, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, "create_model", hub)
    given = {"num_classes": 7, "cache_dir": "weights", **NARROW}
    model = timm.create_model("kw_resnet18_1x", pretrained=True, **given).eval()
    assert asked == [("resnet18", "weights")]
    assert "the classifier of 7 classes starts afresh" in caplog.text
    torch.manual_seed(5)
    static = create("resnet18", num_classes=7, **NARROW).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(x), static(x), atol=1e-5)


@pytest.mark.parametrize("key", ["url", "state_dict"])
def test_other_ways_to_name_weights_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"has '{key}'; give weights as 'file'"):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay={key: "x"})


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_tag_of_timms_weights_is_refused_by_timm(pretrained: bool) -> None:
    with pytest.raises(RuntimeError, match=rf"Invalid pretrained tag .a1_in1k. for {SMALL}"):
        timm.create_model(f"{SMALL}.a1_in1k", pretrained=pretrained)


def test_the_papers_start_by_name() -> None:
    with torch.device("meta"):
        settings = timm.create_model(SMALL, start="paper").warehouses["layer1"].settings
    assert settings.start == "paper"


@pytest.mark.parametrize("features", [False, True])
def test_annealing_by_name(features: bool) -> None:
    """For training scripts that pass arguments on: ``--model-kwargs anneal=4``."""
    model = timm.create_model(SMALL, anneal=4, features_only=features, **NARROW)
    assert all(warehouse.settings.start == "paper" for warehouse in find_warehouses(model))
    found = []
    for _ in range(3):
        model.train()(torch.randn(2, 3, 32, 32))
        found.append(kw.get_temperature(model))
    assert found == [1, 0.75, 0.5]
    for other in ({"start": "keep"}, {"pretrained": True}):
        with pytest.raises(ValueError, match="training from nothing"):
            timm.create_model(SMALL, anneal=4, **other, **NARROW)


def test_copies_keep_their_warehouses() -> None:
    model = copy.deepcopy(timm.create_model(SMALL, features_only=True, **NARROW))
    used = {w.cells.data_ptr() for w in find_warehouses(model)}
    assert used == {w.cells.data_ptr() for w in model.model.warehouses.values()}
