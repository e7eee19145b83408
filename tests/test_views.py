"""Checkpoints at several sizes and on several views of an image."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sets_of_images import CLASSES, ReadsGrey, logits_of, softmax, write_grey, write_run
from torch import nn

from kw.evaluation.views import Views
from kw.training.checkpoint import save_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def test(tested: Callable[..., Any], run: Path) -> Callable[..., Any]:
    return partial(tested, run)


def test_views_are_averaged() -> None:
    """Probabilities, in float64 by hand: of the image and its mirror image, of crops, of both."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 7))
    images = torch.randn(5, 3, 6, 6)
    kept = [0, 2, 3, 6]

    def chances(view: torch.Tensor) -> torch.Tensor:
        return network(view).double()[:, kept].softmax(1)

    starts = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    crops = [images[:, :, y : y + 4, x : x + 4] for y, x in starts]
    small = crops[4]
    for name, given, views in (
        ("flip", small, [small, small.flip(3)]),
        ("five", images, crops),
        ("ten", images, [*crops, *(crop.flip(3) for crop in crops)]),
    ):
        found = Views(network, name, 4, kept)(given)
        expected = torch.stack([chances(view) for view in views]).mean(0)
        assert torch.allclose(found.double().exp()[:, kept], expected, atol=1e-6)
        assert torch.isneginf(found[:, [1, 4, 5]]).all()
    assert torch.equal(Views(network)(small), network(small))


def test_views_by_the_command(test: Any, run: Path) -> None:
    """The images' corners are of another class than the centre: crops change what is right."""
    for label, name in enumerate(CLASSES):
        write_grey(run / "data/val" / name / "0.png", label)
    write_grey(run / "data/val" / CLASSES[0] / "1.png", 0, left=4)
    plain, flipped = test("--crop-ratio", 0.5), test("--crop-ratio", 0.5, "--tta", "flip")
    assert plain["loss"] == pytest.approx(flipped["loss"], rel=1e-5)  # the network sees means
    assert (flipped["tta"], flipped["crop_ratio"]) == ("flip", 0.5)
    five = test("--crop-ratio", 0.5, "--tta", "five")
    # Four plain pictures of five are right; of the fifth, two crops are of 4, two of 0 and one, the
    # centre, of 2: the mean probability is the largest at 0 or 4.
    greys = [0, 4, 0, 4, 2]
    mean = np.mean([softmax(logits_of(20 + 20 * g)) for g in greys], 0)
    assert five["loss"] == pytest.approx(
        (sum(-np.log(softmax(logits_of(20 + 20 * c))[c]) for c in range(12)) - np.log(mean[0]))
        / 13,
        rel=0.02,  # the edge between the halves is smoothed where the picture is enlarged
    )
    assert five["loss"] < plain["loss"]


def test_sizes_and_several_checkpoints(run: Path, tool: Any, tmp_path: Path, capsys: Any) -> None:
    for label, name in enumerate(CLASSES):
        write_grey(run / "data/val" / name / "0.png", label)
    other = write_run(tmp_path / "other", root=str(run / "data"), test_crop_ratio=0.5)
    state = ReadsGrey(12).state_dict()
    state["greys"] = state["greys"].roll(1)  # every class is taken for the next
    save_checkpoint({"state_dict": state, "meta": {"classes": CLASSES}}, other / "best.pth")
    tool("kw test", run, other, "--sizes", "8,12", "--csv", tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == [100, 100, 0, 0]
    assert [row["input_size"] for row in rows] == ["8", "12", "8", "12"]
    assert [row["crop_ratio"] for row in rows] == ["1.0", "1.0", "0.5", "0.5"]
    assert [Path(row["checkpoint"]).parent.name for row in rows] == ["run", "run", "other", "other"]
    assert "other/best.pth" in capsys.readouterr().out
    # One configuration, two checkpoints.
    results = tmp_path / "t.json"
    both = (run / "best.pth", other / "best.pth")
    tool("kw test", run / "config.yaml", *both, "--json", results)
    assert [row["top1"] for row in json.loads(results.read_text())] == [100, 0]


def test_size_changes_what_the_network_sees(run: Path, tool: Any, tmp_path: Path) -> None:
    """A size in --sizes is the same as data.input_size."""
    for label, name in enumerate(CLASSES):
        write_grey(run / "data/val" / name / "0.png", label, left=label + 1)
    found = []
    for options in (("--sizes", 5), ("--set", "data.input_size=5"), ()):
        tool("kw test", run, *options, "--json", tmp_path / "t.json")
        found.append(json.loads((tmp_path / "t.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["loss"] != found[2]["loss"]


def test_a_detector_has_no_sets(tool: Any, tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("mmdet", exc_type=ImportError)
    for options, name in ((("--set", "v2"), "--set v2"), (("--tta", "flip"), "--tta")):
        with pytest.raises(SystemExit):
            tool("kw test", "configs/demo/overfit_coco.py", "none.pth", *options)
        assert f"{name}: is of classifiers" in capfd.readouterr().err


def test_figures_of_several_are_refused(run: Path, tool: Any, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(SystemExit):
        tool("kw test", run, "--sizes", "8,9", "--figures", tmp_path / "figures")
    assert "of one checkpoint at one size" in capfd.readouterr().err


def test_crops_that_are_all_the_same(run: Path, test: Any, capfd: Any) -> None:
    for label, name in enumerate(CLASSES):
        write_grey(run / "data/val" / name / "0.png", label)
    with pytest.raises(SystemExit):
        test("--tta", "five")
    assert "all crops are the same; give a smaller --crop-ratio" in capfd.readouterr().err


def test_crops_of_the_smallest_square(
    run: Path, test: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side is size / ratio rounded down, as a plain test resizes: 8 / 0.88 is 9.09."""
    for label, name in enumerate(CLASSES):
        write_grey(run / "data/val" / name / "0.png", label, left=0)
    sides: list[tuple[int, ...]] = []
    forward = Views.forward
    monkeypatch.setattr(
        Views, "forward", lambda s, x: (sides.append(tuple(x.shape[2:])), forward(s, x))[1]
    )
    five, plain = test("--crop-ratio", 0.88, "--tta", "five"), test("--crop-ratio", 0.88)
    assert set(sides[: len(sides) // 2]) == {(9, 9)}
    assert set(sides[len(sides) // 2 :]) == {(8, 8)}
    assert five["loss"] != plain["loss"]
    with pytest.raises(SystemExit):
        test("--crop-ratio", 0.9, "--tta", "five")  # 8.89
    assert "resized to 8 and cropped to 8: all crops are the same" in capfd.readouterr().err


def test_images_of_several_classes_have_no_views(test: Any, capfd: Any) -> None:
    settings = ("--set", "metrics={multilabel: {}}", "loss.name=bce")
    for option in (("--tta", "flip"), ("--set", "v2"), ("--figures", "figures")):
        with pytest.raises(SystemExit):
            test(*settings, *option)
        assert "no --set, --tta or --figures" in capfd.readouterr().err
