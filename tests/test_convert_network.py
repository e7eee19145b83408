"""tools/convert_network.py: a static checkpoint in, a converted one out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import kw


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    settings["model"]["timm_args"] = {"channels": [8, 16, 16, 32]}
    settings["model"]["kernel_warehouse"] = {"plan": "resnet18", "start": "paper"}
    model = timm.create_model("resnet18", num_classes=4, channels=[8, 16, 16, 32])
    torch.save(model.state_dict(), tmp_path / "static.pth")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("real", [True, False])
def test_a_network_is_converted(
    config: Path, images: Path, tmp_path: Path, tool: Any, capsys: Any, real: bool
) -> None:
    target, weights = tmp_path / "new/converted.pth", tmp_path / "static.pth"
    options = ["--images", images / "val", "--count", 8] if real else []
    tool("kw convert network", config, target, "--weights", weights, *options)
    out = capsys.readouterr().out
    assert out.count("100.00%") == 4
    assert f"the same class for {8 if real else 128}" in out
    network = kw.load(target)
    assert network.description.config.model.kernel_warehouse.start == "keep"
    static = timm.create_model("resnet18", num_classes=4, channels=[8, 16, 16, 32]).eval()
    static.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(network(x), static(x), atol=1e-4)
    tool("tools/test.py", config, target)  # an ordinary checkpoint of this configuration


def test_half_of_the_cells(
    config: Path, images: Path, tmp_path: Path, tool: Any, capsys: Any
) -> None:
    halves = [
        f"model.kernel_warehouse.{key}=0.5"
        for key in ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio")
    ]
    target = tmp_path / "converted.pth"
    arguments = (config, target, "--weights", tmp_path / "static.pth", "--images", images / "val")
    tool("kw convert network", *arguments, "--cfg-options", *halves)
    out = capsys.readouterr().out
    assert out.count("100.00%") < 4
    assert "on 9 images" in out  # the other 10 of 19 say what matters
    assert target.exists()


def test_mistakes(config: Path, tmp_path: Path, tool: Any, capsys: Any) -> None:
    target = tmp_path / "converted.pth"
    for options, message in (
        ((), "expected the static network's weights"),
        (("--weights", tmp_path / "none.pth"), "no such file"),
        (
            (
                "--weights",
                tmp_path / "static.pth",
                "--cfg-options",
                "model.kernel_warehouse=null",
                "temperature_epochs=0",
            ),
            "is a static network",
        ),
    ):
        with pytest.raises(SystemExit):
            tool("kw convert network", config, target, *options)
        assert message in capsys.readouterr().err
    assert not target.exists()
