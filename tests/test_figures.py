"""Figures about an evaluation against direct counts, in float64."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import in_processes
from sets_of_images import CLASSES, logits_of, write_grey, write_run

from kw.data import Listing
from kw.evaluation import Accuracy
from kw.evaluation.outcomes import Outcomes, calibration, class_hits, confusion, worst
from kw.evaluation.sets import TestSet, readable
from kw.pictures.outcomes import most_confused
from kw.training.distributed import Process
from kw.training.figures import write_csv


def random_outcomes(images: int = 203, classes: int = 9) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(images, classes, generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits[torch.arange(images), labels] += 2
    found = Outcomes(images)
    for places in torch.randperm(images, generator=generator).split(17):
        found.update(logits[places], labels[places], places)
    found.gather()
    return found, logits.double().numpy(), labels.numpy()


def direct_ece(confidence: list[float], right: list[bool], bins: int) -> float:
    """Image by image, by the words of the paper."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - mean)
    return 100 * error


def test_names_in_tables_may_be_no_text(tmp_path: Path) -> None:
    write_csv(tmp_path / "mistakes.csv", ["file"], [[os.fsdecode(b"caf\xe9.jpg")]])
    assert (tmp_path / "mistakes.csv").read_bytes() == b"file\r\ncaf\xe9.jpg\r\n"


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration(bins: int) -> None:
    found, logits, labels = random_outcomes()
    powers = np.exp(logits)
    confidence = (powers / powers.sum(1, keepdims=True)).max(1)
    right = logits.argmax(1) == labels
    assert found.confidence == pytest.approx(confidence, rel=1e-5)
    expected = direct_ece(confidence.tolist(), right.tolist(), bins)
    got = calibration(found.confidence, found.best[:, 0] == labels, bins)
    assert got.ece == pytest.approx(expected, rel=1e-5)
    assert got.counts.sum() == len(labels)
    assert np.nansum(got.counts * got.accuracy) == pytest.approx(right.sum())


def test_calibration_at_the_ends() -> None:
    """A bin has its upper end; half of the sure predictions are right."""
    got = calibration(np.array([0.2, 0.200001, 1.0, 1.0]), np.array([1, 0, 1, 0], bool), 5)
    assert got.counts.tolist() == [1, 1, 0, 0, 2]
    assert got.ece == pytest.approx(100 * (0.8 + 0.200001 + 2 * 0.5) / 4)
    assert math.isnan(got.accuracy[2])
    assert calibration(np.array([0.5, np.nan]), np.array([True, True])).ece is None
    assert calibration(np.array([]), np.array([], bool)).ece is None


def test_counts() -> None:
    found, logits, labels = random_outcomes()
    test_set = TestSet("val", "", Listing([], labels.tolist(), list("abcdefghi")))
    order = np.argsort(-logits, 1)
    hits = test_set.hits(found.best)
    counts = class_hits(hits, labels, 9)
    for c in range(9):
        own = [i for i, label in enumerate(labels) if label == c]
        five = sum(c in order[i, :5] for i in own)
        assert counts[c].tolist() == [len(own), sum(order[i, 0] == c for i in own), five]
    pairs = Counter(zip(labels.tolist(), order[:, 0].tolist(), strict=True))
    matrix = confusion(found.best[:, 0], labels, 9)
    assert matrix.tolist() == [[pairs[row, column] for column in range(9)] for row in range(9)]
    accuracy = Accuracy()
    accuracy.update(torch.from_numpy(logits), torch.from_numpy(labels))
    assert matrix.trace() / len(labels) == pytest.approx(accuracy.compute()["top1"] / 100)
    assert hits.any(1).mean() == pytest.approx(accuracy.compute()["top5"] / 100)
    # Images that cannot be read are wrong, and have no loss.
    before = accuracy.compute()
    accuracy.update(torch.from_numpy(logits), torch.full_like(torch.from_numpy(labels), -1))
    after = accuracy.compute()
    assert (after["top1"], after["loss"]) == pytest.approx((before["top1"] / 2, before["loss"]))


def test_images_of_several_labels_count_once_for_each() -> None:
    hits = np.array([[True, False], [False, True], [False, False]])
    counts = class_hits(hits, [[0, 2, 0], [2, 2, 2], [1, 0, 1]], 3)
    assert counts.tolist() == [[2, 1, 1], [1, 0, 0], [2, 1, 2]]


def test_mistakes_are_in_order_of_confidence() -> None:
    confidence = np.array([0.5, 0.9, 0.9, 0.99, np.nan, 0.7])
    right = np.array([False, False, False, True, False, False])
    predicted = np.array([1, 1, 1, 1, 1, -1])
    assert worst(confidence, right, predicted, 2).tolist() == [1, 2]
    assert worst(confidence, right, predicted, 9).tolist() == [1, 2, 0]


def test_classes_that_are_confused_most() -> None:
    matrix = np.diag([100] * 30)
    matrix[7, 25], matrix[25, 3], matrix[11, 12], matrix[1, 2] = 9, 8, 7, 1
    assert most_confused(matrix, 5).tolist() == [3, 7, 11, 12, 25]
    assert most_confused(matrix, 4).tolist() == [3, 7, 25]  # a pair has both, or is left out
    assert most_confused(matrix, 30).tolist() == list(range(30))


def test_every_image_is_evaluated() -> None:
    found = Outcomes(3)
    found.update(torch.eye(3)[:2], torch.tensor([0, -1]), torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="1 images were not evaluated, the first is 1"):
        found.gather()
    found.update(torch.eye(3)[1:2], torch.tensor([1]), torch.tensor([1]))
    found.gather()
    assert found.best.tolist() == [
        [-1] * 5,
        [1, *found.best[1, 1:3], -1, -1],
        [0, *found.best[2, 1:3], -1, -1],
    ]
    assert found.confidence[0] == 0


def share(process: Process, folder: Path) -> None:
    _, logits, labels = random_outcomes()
    mine = torch.arange(process.rank, len(labels), process.world_size)
    found = Outcomes(len(labels))
    found.update(torch.from_numpy(logits)[mine], torch.from_numpy(labels)[mine], mine)
    found.gather()
    np.savez(folder / f"{process.rank}.npz", best=found.best, confidence=found.confidence)


def test_processes_share_the_images(tmp_path: Path) -> None:
    in_processes(share, 3, tmp_path)
    alone = random_outcomes()[0]
    for rank in range(3):
        found = np.load(tmp_path / f"{rank}.npz")
        assert (found["best"] == alone.best).all()
        assert found["confidence"] == pytest.approx(alone.confidence, rel=1e-6)


@pytest.fixture
def written(tool: Any, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Figures of twelve classes of three images: of class 4, two are taken for 5 and for 3."""
    run = write_run(tmp_path / "run")
    for label, name in enumerate(CLASSES):
        for i, off in enumerate((0, 0.9, -0.7) if label == 4 else (0, 0.1, -0.2)):
            write_grey(run / "data/val" / name / f"{i}.png", label + off)
    results = tmp_path / "results.json"
    tool("kw test", run, "--figures", tmp_path / "figures", "--json", results)
    return tmp_path / "figures", json.loads(results.read_text())


def test_a_process_on_its_own_tells_its_results(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that some queue has called the second of its job."""
    run, results = write_run(tmp_path / "run"), tmp_path / "results.json"
    for label, name in enumerate(CLASSES):
        write_grey(run / "data/val" / name / "0.png", label)
    monkeypatch.setenv("RANK", "1")
    tool("kw test", run, "--json", results)
    assert json.loads(results.read_text())["top1"] == 100


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_files(written: tuple[Path, dict[str, Any]]) -> None:
    folder, results = written
    classes = rows_of(folder / "per_class.csv")
    assert [row["class"] for row in classes] == CLASSES
    assert [row["name"] for row in classes] == readable(CLASSES)
    assert [row["images"] for row in classes] == ["3"] * 12
    assert [float(row["top1"]) for row in classes] == [100.0] * 4 + [33.3333] + [100.0] * 7
    matrix = rows_of(folder / "confusion.csv")
    row = matrix[4]
    assert row["true \\ predicted"] == CLASSES[4]
    assert [int(row[name]) for name in CLASSES] == [0, 0, 0, 1, 1, 1, *[0] * 6]
    mistakes = rows_of(folder / "mistakes.csv")
    # 0.9 steps off is nearer to another class than 0.7 is: more confident.
    names = readable(CLASSES)
    assert [(m["true"], m["predicted"]) for m in mistakes] == [
        (names[4], names[5]),
        (names[4], names[3]),
    ]
    powers = np.exp(logits_of(round(20 + 20 * 4.9)))
    assert float(mistakes[0]["confidence"]) == pytest.approx(
        (powers / powers.sum()).max(), abs=1e-4
    )
    assert results["top1"] == pytest.approx(100 * 34 / 36)
    right = [i not in (13, 14) for i in range(36)]
    sure = []
    for label in range(12):
        for off in (0, 0.9, -0.7) if label == 4 else (0, 0.1, -0.2):
            powers = np.exp(logits_of(round(20 + 20 * (label + off))))
            sure.append((powers / powers.sum()).max())
    assert results["ece"] == pytest.approx(direct_ece(sure, right, 15), rel=1e-5)


def test_pictures(written: tuple[Path, dict[str, Any]]) -> None:
    """The contact sheet has the mistakes' own pixels."""
    folder, _ = written
    for name in ("confusion", "mistakes", "reliability"):
        assert min(Image.open(folder / f"{name}.png").size) > 200
    pixels = np.asarray(Image.open(folder / "mistakes.png").convert("RGB")).reshape(-1, 3)
    counts = Counter(map(tuple, pixels.tolist()))
    for grey in (round(20 + 20 * 4.9), round(20 + 20 * 3.3)):
        assert counts[grey, grey, grey] > 5000


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_mistakes_of_other_channels(tool: Any, tmp_path: Path, mode: str) -> None:
    """Two channels are shown as the grey of the first, four as the colours of the first three."""
    count = len(mode)
    channels = {"channels": count, "mean": [0.0] * count, "std": [1.0] * count}
    run = write_run(tmp_path / "run", **channels)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["timm_args"] = {"in_chans": count}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in CLASSES:
        file = write_grey(run / "data/val" / name / "0.png", 3.3)
        grey = Image.open(file).convert("L")
        Image.merge(mode, [grey] * count).save(file)
    tool("kw test", run, "--figures", tmp_path / "figures")
    pixels = np.asarray(Image.open(tmp_path / "figures/mistakes.png").convert("RGB"))
    assert (pixels == round(20 + 20 * 3.3)).all(2).sum() > 5000


def test_without_matplotlib(tool: Any, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """It is missed before the images are read."""
    import sys

    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        tool("kw test", run, "--figures", tmp_path / "figures")
    assert "pictures need matplotlib" in capfd.readouterr().err
