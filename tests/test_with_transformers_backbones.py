"""transformers' wrappers of timm: our names as backbones and as classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import kw
from kw.warehouse.attention import KernelAttention

transformers = pytest.importorskip("transformers", reason="needs transformers")

SMALL = "kw_resnet18_1d4x"


def config(**settings: Any) -> Any:
    return transformers.TimmBackboneConfig(backbone=SMALL, out_indices=[1, 2, 3, 4], **settings)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64)


def lived_in(model: torch.nn.Module, tau: float = 0.5) -> torch.nn.Module:
    """With all parts of the coefficients at work."""
    for module in model.modules():
        if isinstance(module, KernelAttention):
            torch.nn.init.normal_(module.fc2.weight, std=0.1)
    kw.set_temperature(model, tau)
    return model.eval()


def test_a_backbone(tmp_path: Path) -> None:
    """timm's features; weights from a file of ours; a state goes from one to another."""
    source = lived_in(timm.create_model(SMALL))
    torch.save(source.state_dict(), tmp_path / "best.pth")
    backbone = transformers.TimmBackbone.from_pretrained(
        SMALL, out_indices=[1, 2, 3, 4], pretrained_cfg_overlay={"file": tmp_path / "best.pth"}
    ).eval()
    assert backbone.channels == [64, 128, 256, 512]
    x = images()
    expected = source.forward_intermediates(x, intermediates_only=True)[1:]
    for found, feature in zip(backbone(x).feature_maps, expected, strict=True):
        torch.testing.assert_close(found, feature)
    other = transformers.AutoBackbone.from_config(config()).eval()
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(x).feature_maps[-1], backbone(x).feature_maps[-1])


def test_frozen_statistics() -> None:
    """The network's BatchNorm2d becomes FrozenBatchNorm2d; that of the branches is another kind."""
    backbone = transformers.AutoBackbone.from_config(config(freeze_batch_norm_2d=True))
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert {"BatchNorm1d", "FrozenBatchNorm2d"} <= kinds
    assert "BatchNorm2d" not in kinds


def test_a_detector_around_it(tmp_path: Path) -> None:
    """DETR, as it is built, trained, saved and loaded: on the meta device, without a state dict."""
    settings = transformers.DetrConfig(
        backbone_config=config(),
        d_model=32,
        num_queries=5,
        **dict.fromkeys(["encoder_layers", "decoder_layers"], 1),
        **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 32),
        **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    )
    model = transformers.DetrForObjectDetection(settings)
    branches = [m for m in model.modules() if isinstance(m, KernelAttention)]
    assert not any(branch.fc2.weight.any() for branch in branches)  # starts as the static network
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    model.train()(images(), labels=[target] * 2).loss.backward()
    # timm starts residual branches at zero, and DETR freezes the factors that are.
    assert sum(bool(branch.fc2.weight.grad.any()) for branch in branches) == 3
    lived_in(model)
    model.save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    assert kw.get_temperature(again) == 0.5
    x = images()
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("kind", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_wrapped_network_comes_back(kind: str, tau: float, tmp_path: Path) -> None:
    """Beta, which no file holds, is made anew; not-a-number at any temperature otherwise."""
    settings = transformers.TimmWrapperConfig(architecture=SMALL, num_labels=5)
    model = lived_in(getattr(transformers, kind)(settings), tau)
    model.save_pretrained(tmp_path)
    again = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    assert kw.get_temperature(again) == tau
    x = images()
    found = again(x)[0]
    assert found.isfinite().all()
    assert torch.equal(found, model(x)[0])


def test_a_wrapped_network_begins_as_a_static_one() -> None:
    """transformers initialises layers anew; not those of the attention branches."""
    settings = transformers.TimmWrapperConfig(architecture=SMALL, num_labels=5)
    kept = transformers.TimmWrapperForImageClassification(settings)
    settings.model_args = {"start": "paper"}
    paper = transformers.TimmWrapperForImageClassification(settings)
    for model, is_static in ((kept, True), (paper, False)):
        branches = [m for m in model.modules() if isinstance(m, KernelAttention)]
        assert branches
        assert all(branch.fc2.weight.any() != is_static for branch in branches)


def test_arguments_of_detrex() -> None:
    """Its ``TimmBackbone`` calls ``timm.create_model`` so, and reads channels and strides."""
    backbone = timm.create_model(
        SMALL,
        pretrained=False,
        checkpoint_path="",
        in_chans=3,
        features_only=True,
        out_indices=(1, 2, 3),
        norm_layer=torch.nn.BatchNorm2d,
    )
    assert backbone.feature_info.channels() == [64, 128, 256]
    assert backbone.feature_info.reduction() == [4, 8, 16]
    assert [f.shape[1:] for f in backbone(images())] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
