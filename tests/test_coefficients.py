"""What is said of a network's attention, on networks whose attention is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from kw import convert, set_temperature
from kw.config import config_from_mapping
from kw.pictures import coefficients, dynamic_layers, measure_layer
from kw.pictures.coefficients import LayerMeasure
from kw.training import train


def network(**overrides: Any) -> nn.Module:
    """Two layers that share a warehouse of 9 + 9 mixtures."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    plan = {"rules": [{"match": r"\d", "warehouse": "all"}], "norm": "layer", "start": "paper"}
    return convert(layers, plan, **overrides)


def measured(model: nn.Module, images: torch.Tensor) -> list[LayerMeasure]:
    alpha = coefficients(model, images)
    return [measure_layer(layer, alpha[layer.name]) for layer in dynamic_layers(model)]


def test_at_the_start_every_mixture_has_its_own_cell() -> None:
    model = network().train()
    set_temperature(model, 1.0)
    first, second = measured(model, torch.randn(5, 4, 6, 6))
    assert first == ("0", 9, 18, 1, 0, 0, 0)
    assert second == ("2", 9, 18, 1, 0, 0, 0)
    assert all(module.training for module in model.modules())


def test_coefficients_are_measured_as_they_are_written_down() -> None:
    """Against the attention's own output for two images, by hand."""
    model: Any = network(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
    images = torch.randn(2, 4, 6, 6)
    (first, _) = measured(model, images)
    alpha = model[0].attention(images.mean((2, 3)), torch.tensor(0.0))  # [2, 36, 36]
    owners = [(i, cell) for i, cell in enumerate(model[0].attention.own.owners) if cell is not None]
    own = torch.stack([alpha[:, i, cell] for i, cell in owners])
    total = alpha.abs().sum() - own.abs().sum()
    assert len(owners) == 18  # the others start on the null cell
    assert first.own == pytest.approx(own.mean().item(), rel=1e-4)
    assert first.others == pytest.approx(total.item() / (2 * 36), rel=1e-4)
    assert first.negative == pytest.approx((alpha < 0).sum().item() / alpha.numel())
    spread = ((alpha[0] - alpha[1]) / 2**0.5).square().sum()
    centre = ((alpha[0] + alpha[1]) / 2).square().sum()
    assert first.variation == pytest.approx((spread / centre).sqrt().item(), rel=1e-4)


def test_equal_images_do_not_vary() -> None:
    images = torch.randn(1, 4, 6, 6).expand(3, -1, -1, -1)
    assert all(each.variation < 1e-5 for each in measured(network(), images))


def test_the_tool_names_every_layer(
    settings: dict[str, Any],
    tmp_path: Path,
    tool: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings |= {"epochs": 1}
    train(config_from_mapping(settings, check_model_name=False), tmp_path / "run")
    run = tmp_path / "run"
    out = ("--out", tmp_path / "attention.png", "--images", 8)
    tool("tools/visualize.py", "attention", run / "config.yaml", run / "last.pth", *out)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| layer")][1:]
    assert len(names) == 12
    assert names[0] == "layer1.0.conv1"

    settings["model"].pop("kernel_warehouse")
    static = tmp_path / "static.yaml"
    static.write_text(yaml.safe_dump(settings | {"temperature_epochs": 0}))
    with pytest.raises(SystemExit) as refused:
        tool("tools/visualize.py", "attention", static, run / "last.pth", *out)
    assert refused.value.code == 2
