"""segmentation-models-pytorch: our names in timm as encoders, ``"tu-kw_..."``."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import kw
from kw.warehouse import find_warehouses

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")

SMALL = "tu-kw_resnet18_1d4x"
NARROW = {"channels": [8, 16, 24, 32]}  # encoders take what timm.create_model takes


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, 64, 64)


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_unet_trains(depth: int, channels: int) -> None:
    model = smp.Unet(
        SMALL,
        encoder_weights=None,
        encoder_depth=depth,
        decoder_channels=(32, 16, 16, 8, 8)[:depth],
        in_channels=channels,
        classes=3,
        **NARROW,
    )
    kw.set_temperature(model, 0.5)
    y = model(images(channels))
    assert y.shape == (2, 3, 64, 64)
    y.square().mean().backward()
    # A shallower encoder has fewer warehouses; what it has is used.
    stages = ["layer1", "layer2", "layer3", "layer4"][: depth - 1]
    assert list(model.encoder.model.model.warehouses) == stages
    assert all(warehouse.cells.grad is not None for warehouse in find_warehouses(model))


@pytest.mark.parametrize("stride", [8, 16])
def test_dilated_encoders(stride: int) -> None:
    """DeepLabV3+ asks for an output stride: the converted layers are dilated like the static ones,
    and compute the same."""
    torch.manual_seed(0)
    settings = {"encoder_weights": None, "encoder_output_stride": stride}
    static = smp.DeepLabV3Plus("tu-resnet18", **settings).eval()
    torch.manual_seed(0)
    model = smp.DeepLabV3Plus("tu-kw_resnet18_1x", **settings).eval()
    dilations = [
        {n.rpartition("model.")[2]: m.dilation for n, m in encoder.named_modules() if kernel(m)}
        for encoder in (static.encoder, model.encoder)
    ]
    assert dilations[0] == dilations[1]
    assert (32 // stride, 32 // stride) in dilations[1].values()
    x = images()
    for expected, found in zip(static.encoder(x), model.encoder(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model(x).shape == static(x).shape


def kernel(module: torch.nn.Module) -> bool:
    return hasattr(module, "padding_mode")


def test_weights_of_a_file(tmp_path: Path) -> None:
    """``encoder_weights=True`` is timm's ``pretrained=True``: from the hub, or a file."""
    trained, path = timm.create_model(SMALL[3:], **NARROW).eval(), tmp_path / "best.pth"
    for module in trained.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.uniform_(-0.1, 0.1)
    kw.set_temperature(trained, 0.25)
    torch.save(trained.state_dict(), path)
    model = smp.Unet(
        SMALL, encoder_weights=True, pretrained_cfg_overlay={"file": str(path)}, **NARROW
    ).eval()
    assert kw.get_temperature(model) == 0.25
    x = images()
    torch.testing.assert_close(
        model.encoder(x)[-1], trained.forward_intermediates(x, intermediates_only=True)[-1]
    )


def test_a_saved_network_comes_back(tmp_path: Path) -> None:
    """The name of its encoder says how it is built."""
    torch.manual_seed(0)
    model = smp.Unet(SMALL, encoder_weights=None, classes=2, **NARROW).eval()
    kw.set_temperature(model, 0.5)
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    x = images()
    assert torch.equal(again(x), model(x))


def test_a_network_that_was_converted_itself(tmp_path: Path) -> None:
    """``convert`` on any of its networks; only saving by name is refused."""
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None).eval()
    x = images()
    expected = model(x)
    kw.convert(model, "auto", x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="save_pretrained cannot save a converted network"):
        model.save_pretrained(tmp_path)
