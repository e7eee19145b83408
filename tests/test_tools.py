"""The command lines, as a user calls them; several processes among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import call


def log_of(work_dir: Path, mode: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["mode"] == mode]


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    settings["ema"] = {"decay": 0.5}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_two_processes_follow_the_recipe_of_one(config: Path, tmp_path: Path) -> None:
    """Two of batch 8 and one of 16: the same losses up to summation order, 1e-3."""
    one, two = tmp_path / "one", tmp_path / "two"
    call("tools/train.py", config, "--work-dir", one)
    options = ["--cfg-options", "batch_size=8"]
    call("tools/train.py", config, "--work-dir", two, *options, processes=2)
    for mode, keys in (("train", ("loss", "lr", "temperature")), ("val", ("loss", "ema_loss"))):
        alone, shared = log_of(one, mode), log_of(two, mode)
        assert len(alone) == len(shared) == {"train": 8, "val": 2}[mode]
        for key in keys:
            assert [x[key] for x in shared] == pytest.approx([x[key] for x in alone], rel=1e-3)
    assert all(line["images"] == 19 for line in log_of(two, "val"))

    # The same weights, evaluated by one, two and three processes: the same to the last image.
    found = []
    for processes in (1, 2, 3):
        file = tmp_path / f"{processes}.json"
        call("tools/test.py", config, two / "best.pth", "--json", file, processes=processes)
        found.append(json.loads(file.read_text()))
    for results in found:
        assert results["images"] == 19
        for key in ("top1", "top5", "model_top1", "model_top5"):
            assert results[key] == found[0][key]
        assert results["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)

    pytest.importorskip("matplotlib")
    plot = tmp_path / "curves.png"
    table = call("kw study compare", one, two, "--plot", plot).stdout
    for run in (one, two):
        results = json.loads((run / "results.json").read_text())
        assert f"| {run.name}" in table
        assert f"{results['top1']:.2f}" in table
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_batch_norm_agrees_across_processes(config: Path, tmp_path: Path) -> None:
    """Statistics are averaged before anything is saved or evaluated; resuming works with two."""
    options = ["batch_size=8", "model.timm_args={channels: [8, 8, 16, 16], _delete_: true}"]
    arguments = ("tools/train.py", config, "--work-dir", tmp_path, "--cfg-options", *options)
    call(*arguments, processes=2)
    found = tmp_path / "found.json"
    epoch = tmp_path / "epoch_2.pth"
    call("tools/test.py", config, epoch, "--json", found, "--cfg-options", *options)
    alone, trained = json.loads(found.read_text()), log_of(tmp_path, "val")[-1]
    assert alone["top1"] == trained["ema_top1"]
    assert alone["model_loss"] == pytest.approx(trained["loss"], rel=1e-5)

    epoch.unlink()
    call(*arguments, "--resume", processes=2)
    assert log_of(tmp_path, "val")[-1]["loss"] == pytest.approx(trained["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tools/train.py", "{config}", "--cfg-options", "epoch=3"), ["epoch", "epochs"]),
        (("tools/train.py", "{config}", "--cfg-options", "data.root=nowhere"), ["nowhere"]),
        (("tools/train.py", "{config}", "--launcher", "pytorch"), ["torchrun"]),
        (("tools/test.py", "{config}", "none.pth"), ["none.pth", "no such file"]),
        (("kw study compare", "{work}"), ["results.json"]),
    ],
)
def test_mistakes_are_one_message(
    config: Path, tmp_path: Path, arguments: tuple[str, ...], expected: list[str]
) -> None:
    filled = [a.format(config=config, work=tmp_path) for a in arguments]
    done = call(*filled, status=2)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert all(words in done.stderr for words in expected)
