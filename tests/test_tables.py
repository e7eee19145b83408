"""Metafiles agree with configurations and models; READMEs with metafiles; mistakes are named."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from breadth import breadth

from kw.config import load_config
from kw.evaluation import SOURCES, read_metafile, render_readme
from kw.evaluation.tables import BEGIN, END
from kw.models.complexity import analyze

ROOT = Path(__file__).parents[1]
METAFILES = sorted((ROOT / "configs/imagenet").glob("*/metafile.yml"))
CHECKPOINTS = json.loads((ROOT / "tests/fixtures/released_models.json").read_text())["models"]
# What a head says of a figure's source.
SAID = {**SOURCES, "repo": "the authors' results page", "recalled": "unconfirmed: "}
every_family = pytest.mark.parametrize("path", METAFILES, ids=lambda path: path.parent.name)


def models(path: Path) -> list[dict[str, Any]]:
    return [model for table in read_metafile(path) for model in table["models"]]


@every_family
def test_metafile_agrees_with_configurations_and_checkpoints(path: Path) -> None:
    files = {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*.yaml")}
    assert {m["config"] for m in models(path)} == files
    for model in models(path):
        head = (path.parent / model["config"]).read_text().split("\n\n")[0]
        name, published = model["name"], model["published"].figures
        if model["published"].same_run is None:
            assert f"# Reproduces  {name} of" in head
            if "top1" not in published:
                assert "# Expect      no figure: " in head
                assert f"# Parameters  {model['parameters'] / 1e6:.2f}M; " in head
                continue
            top5 = f", top-5 {published['top5']:.2f}" if "top5" in published else ""
            assert f"top-1 {published['top1']:.2f}{top5} (" in head
            assert f"({SAID[model['published'].source]}" in head
        if name in CHECKPOINTS:
            assert model["parameters"] == CHECKPOINTS[name]["parameters"]
        if "params_m" not in published:
            assert f"# Parameters  {model['parameters'] / 1e6:.2f}M" in head
            continue
        assert f"# Parameters  {published['params_m']:.2f}M as published." in head
        # The papers compare with others' methods in their own implementations of them.
        ours = name.startswith("kw_") or name.count("_") == 0
        room = 0.06 if ours else 0.01 * published["params_m"]
        assert abs(model["parameters"] / 1e6 - published["params_m"]) < room


@pytest.mark.parametrize(
    "path", breadth(METAFILES, METAFILES[:1]), ids=lambda path: path.parent.name
)
def test_metafile_agrees_with_the_networks(path: Path) -> None:
    for model in models(path):
        cost = analyze(load_config(path.parent / model["config"], check_model_name=False))
        counted = (cost.params, cost.macs_static, cost.macs_assembly)
        assert counted == (model["parameters"], model["macs"], model["macs_assembly"])


@every_family
def test_readme_is_up_to_date(path: Path) -> None:
    readme = path.with_name("README.md")
    assert render_readme(readme) == readme.read_text(), "run python scripts/render_tables.py"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A family of one model with figures, measured ones among them."""
    folder = tmp_path / "deit"
    folder.mkdir()
    (folder / "deit_tiny.yaml").touch()
    model = {
        "name": "deit_tiny",
        "parameters": 1_234_567,
        "macs": 10**9,
        "macs_assembly": 0,
        "measured": {"top1": 69.5, "top5": 90, "note": "one run"},
    }
    metafile = {"tables": [{"table": "imagenet_deit_300ep", "models": [model]}]}
    (folder / "metafile.yml").write_text(yaml.safe_dump(metafile))
    (folder / "README.md").write_text(f"# Net\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    return folder


def run_tool(monkeypatch: pytest.MonkeyPatch, root: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["render_tables.py", "--root", str(root), *options])
    try:
        runpy.run_path(str(ROOT / "scripts/render_tables.py"), run_name="__main__")
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_tool_writes_and_checks(
    family: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, readme = family.parent, family / "README.md"
    assert run_tool(monkeypatch, root, "--check") == 1
    assert f"not up to date: {readme}" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert run_tool(monkeypatch, root) == 0
    text = readme.read_text()
    assert text.startswith(f"# Net\n\n{BEGIN}\n\n### ImageNet, DeiT\n\n| Model")
    assert text.endswith(f"|\n\n{END}\n\nAfter.\n")
    row = [cell.strip() for cell in text.splitlines()[8].strip("|").split("|")]
    assert row == [
        "[deit_tiny](deit_tiny.yaml)",
        "1.23M",
        "1.00G",
        "-",
        "5.72M",
        "72.13 / 91.32",
        "unconfirmed",
        "69.50 / 90.00",
    ]
    assert run_tool(monkeypatch, root, "--check") == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metafile.yml", "macs:", "mac:", "model 'deit_tiny': missing ['macs'], unknown"),
        ("metafile.yml", "_deit_", "_diet_", "did you mean 'imagenet_deit_300ep'?"),
        ("metafile.yml", "deit_tiny", "deit_tinny", "did you mean 'deit_tiny'?"),
        ("metafile.yml", "deit_tiny", "deit_small", "'deit_small.yaml' is not beside"),
        ("README.md", END, "", "expected once, in this order, the lines"),
    ],
)
def test_mistakes_are_named(
    family: Path,
    file: str,
    old: str,
    new: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = family / file
    path.write_text(path.read_text().replace(old, new))
    assert run_tool(monkeypatch, family.parent) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error
