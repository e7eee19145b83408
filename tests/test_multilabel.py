"""Images with any number of classes each: targets, loss, and figures against scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breadth import breadth
from conftest import SMALL, settings_of
from PIL import Image
from processes import in_processes
from torch import nn

from kw.config import ConfigError, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.data import BatchPreprocessor
from kw.data.listing import Listing
from kw.data.reading import DataError
from kw.deploy import load
from kw.deploy.card import write_card
from kw.deploy.description import InputRange
from kw.deploy.source import read_source
from kw.deploy.verify import Difference
from kw.evaluation.multilabel import MultiLabel, average_precision
from kw.models import ImageClassifier
from kw.models.losses import bce
from kw.pictures.samples import few_of_each
from kw.training import evaluate_checkpoint, train
from kw.training.distributed import Process
from kw.training.objective import check_labels
from kw.training.run import evaluate

Settings = dict[str, Any]
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def made(samples: int, classes: int = 5, digits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, of which few digits make many equal, and labels that go with them."""
    rng = np.random.default_rng(samples)
    logits = rng.normal(-0.5, 1.5, (samples, classes)).round(digits).astype(np.float32)
    labels = rng.random((samples, classes)) < 1 / (1 + np.exp(-logits))
    return torch.from_numpy(logits), torch.from_numpy(labels)


# --- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [8, 1, 0])
@pytest.mark.parametrize("samples", [1, 2, 17, 1000])
def test_average_precision_is_scikit_learns(samples: int, digits: int) -> None:
    logits, labels = made(samples, digits=digits)
    found = average_precision(logits, labels)
    assert found.dtype == torch.float64
    for place, value in enumerate(found.tolist()):
        if not labels[:, place].any():
            assert np.isnan(value)
            continue
        expected = sklearn_metrics.average_precision_score(labels[:, place], logits[:, place])
        assert value == pytest.approx(expected, rel=1e-12)
    # To the bit in any order of the samples.
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        average_precision(logits[order], labels[order]), found, rtol=0, atol=0, equal_nan=True
    )


def test_average_precision_by_hand() -> None:
    """Ranks 1 and 3 of 4 are right: (1/1 + 2/3) / 2; all alike: the share of those present."""
    scores = torch.tensor([[4.0, 0], [3, 0], [2, 0], [1, 0]])
    labels = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0]], dtype=torch.bool)
    assert average_precision(scores, labels).tolist() == pytest.approx([5 / 6, 1 / 4])
    scores[3, 1] = torch.nan
    assert average_precision(scores, labels).isnan().tolist() == [False, True]


def figures(logits: torch.Tensor, labels: torch.Tensor, size: int = 7) -> dict[str, Any]:
    """With the logits of every batch in the same memory, as of a network in a CUDA graph."""
    metric, memory = MultiLabel(), torch.empty(size, logits.shape[1])
    for start in range(0, len(logits), size):
        batch = logits[start : start + size]
        metric.update(memory[: len(batch)].copy_(batch), labels[start : start + size])
    return metric.compute()


def test_figures_are_scikit_learns() -> None:
    logits, labels = made(203)
    found = figures(logits, labels)
    ours, truth = logits.double().sigmoid().numpy(), labels.numpy()
    expected = {
        "mAP": 100 * sklearn_metrics.average_precision_score(truth, ours, average="macro"),
        "f1": 100 * sklearn_metrics.f1_score(truth, ours > 0.5, average="micro"),
        "loss": np.mean(
            [sklearn_metrics.log_loss(t, o) for t, o in zip(truth.T, ours.T, strict=True)]
        ),
        "images": 203,
    }
    assert found == pytest.approx(expected, rel=1e-9)
    for kind in (torch.uint8, torch.float32):
        assert figures(logits, labels.to(kind)) == found


def test_absent_classes_and_bad_images_are_told() -> None:
    logits, labels = made(40)
    labels[:, [1, 3]] = False
    labels[:, 0] |= True
    found = figures(logits, labels)
    rest = [0, 2, 4]
    expected = sklearn_metrics.average_precision_score(labels[:, rest], logits[:, rest])
    assert found["mAP"] == pytest.approx(100 * expected)
    assert found["absent_classes"] == 2
    marks = torch.cat([labels.to(torch.int8), torch.full((3, 5), -1, dtype=torch.int8)])
    bad = figures(torch.cat([logits, torch.zeros(3, 5)]), marks)
    assert bad == {**found, "images": 43, "unreadable_images": 3}


def test_there_is_no_precision_of_nan() -> None:
    """It is None: NaN would stay the best score, since nothing is larger."""
    logits, labels = made(40)
    logits[3, 2] = torch.nan
    assert labels[:, 2].any()
    assert figures(logits, labels)["mAP"] is None


def test_nothing_to_evaluate_is_an_error() -> None:
    logits, labels = made(4)
    with pytest.raises(ValueError, match="no image on any process"):
        MultiLabel().compute()
    with pytest.raises(ValueError, match="none of 4 images can be read"):
        figures(logits, torch.full((4, 5), -1))
    with pytest.raises(ValueError, match="none of 4 images has a class"):
        figures(logits, labels & False)
    with pytest.raises(ValueError, match="found one class; leave the metric out"):
        MultiLabel().update(logits, torch.zeros(4))
    nothing = figures(-logits.abs() - 1, torch.eye(5)[:4] > 0)
    assert nothing["f1"] == 0


def share(process: Process, expected: dict[str, Any]) -> None:
    """Of 21 images; the last process has none."""
    logits, labels = made(21, digits=1)
    metric = MultiLabel()
    if (readers := process.world_size - 1) > process.rank:
        own = slice(process.rank, None, readers)
        metric.update(logits[own], labels[own])
    found = metric.compute()
    loss = found.pop("loss"), expected.pop("loss")
    assert loss[0] == pytest.approx(loss[1], rel=1e-12)  # a sum in another order
    assert found == expected


def test_figures_do_not_depend_on_processes() -> None:
    in_processes(share, 3, figures(*made(21, digits=1)))


# --- targets and loss ------------------------------------------------------------------------


def batch_of(labels: torch.Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {"images": images, "labels": labels, "key": (0, 0)}


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
def test_targets(kind: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]]).to(kind)
    for smoothing, (no, yes) in ((0.0, (0.0, 1.0)), (0.2, (0.1, 0.9))):
        preprocess = BatchPreprocessor(DataConfig("unused"), 3, smoothing)
        targets = preprocess(batch_of(labels), training=True)[1]
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets, torch.tensor([[yes, no, yes], [no, no, no]]))
        assert torch.equal(preprocess(batch_of(labels), training=False)[1], labels)


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixed_targets_are_those_of_both_images(mixing: dict[str, float]) -> None:
    """The share follows from the images."""
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    batch = batch_of(labels)
    preprocess = BatchPreprocessor(DataConfig("unused", **mixing), 3, 0.1)
    clean, _ = preprocess(batch, training=False)
    mixed, targets = preprocess(batch, training=True)
    if "mixup" in mixing:
        kept = float(((mixed - clean.flip(0)) / (clean - clean.flip(0))).nanmedian())
    else:
        kept = float((mixed[0] == clean[0]).all(0).float().mean())
    assert 0 < kept < 1
    smoothed = labels * 0.9 + 0.05
    torch.testing.assert_close(targets, kept * smoothed + (1 - kept) * smoothed.flip(0))


def test_bce_of_several_classes() -> None:
    logits, labels = made(12)
    p = logits.double().sigmoid()
    expected = -torch.where(labels, p, 1 - p).log()
    found = bce(logits.double(), labels.float())
    torch.testing.assert_close(found, expected.mean(), rtol=1e-12, atol=0)
    found = bce(logits.double(), labels.float(), sum_classes=True)
    torch.testing.assert_close(found, expected.sum(1).mean(), rtol=1e-12, atol=0)


def test_it_learns_and_is_evaluated() -> None:
    """Class c is present where colour c is bright: any number of the three."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.random((64, 3)) < 0.4)
    images = (
        60 + 100 * labels[:, :, None, None] + torch.from_numpy(rng.integers(0, 40, (64, 3, 8, 8)))
    )
    batches = [
        {"images": images[i : i + 16].to(torch.uint8), "labels": labels[i : i + 16], "key": (0, i)}
        for i in range(0, 64, 16)
    ]
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    preprocess = BatchPreprocessor(DataConfig("unused", mixup=0.2), 3, 0.1)
    model = ImageClassifier(network, preprocess, bce)

    def tested() -> dict[str, Any]:
        loader: Any = batches
        return evaluate(network, preprocess, loader, "fp32", {"multilabel": {}})

    assert (tested()["mAP"] or 0) < 90
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    for _ in range(60):
        for batch in batches:
            model(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    figures = tested()
    assert set(figures) == {"mAP", "f1", "loss", "images"}  # no top-1
    assert figures["mAP"] == pytest.approx(100)
    assert figures["f1"] == pytest.approx(100)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """64 + 22 images in which a colour is bright where its class is present."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 22)):
        lines = ["file,label"]
        for number in range(count):
            present = rng.random(3) < 0.4
            pixels = 60 + 100 * present + rng.integers(0, 40, (20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{split}{number}.png")
            names = np.array(["blue", "green", "red"])[present[::-1]]
            lines.append(f"{split}{number}.png,{';'.join(names)}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("memory", breadth([None, {"place": "host"}], [None]))
def test_a_run(table: Path, memory: Any, tmp_path: Path) -> None:
    """From a table to results: the best epoch by its mean average precision, a bad image told."""
    (table / "val3.png").write_bytes(b"no image")
    settings = settings_of(table)
    settings["model"] |= {"num_classes": 3, "timm_args": SMALL}
    settings["data"] |= {
        "dataset": "csv", "dataset_args": {"separator": ";"}, "mixup": 0.2, "memory": memory,
        "bad_images": {"max_fraction": 0.1},
    }  # fmt: skip
    settings |= {"loss": {"name": "bce"}, "metrics": {"multilabel": {}}, "epochs": 8}
    settings |= {"temperature_epochs": 0, "checkpoint": {"keep": 8}}
    settings["optimizer"]["lr"] = 0.01
    config = config_from_mapping(settings)
    metrics = train(config, tmp_path / "run")
    assert metrics["images"] == 22
    assert metrics["unreadable_images"] == 1
    assert "top1" not in metrics
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    best = max(line["mAP"] for line in lines if line["mode"] == "val")
    assert best > 90
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["mAP"] == best
    with pytest.warns(UserWarning, match=r"cannot read .*val3\.png"):
        again = evaluate_checkpoint(config, tmp_path / "run/best.pth")
    assert again["mAP"] == best
    classifier = load(tmp_path / "run")
    (found,) = classifier.predict(table / "val0.png", k=3)
    logits = classifier.logits(classifier.read(table / "val0.png")[None])[0]
    for each in found:  # of each class by itself: they need not sum to 1
        assert each.probability == pytest.approx(float(logits[each.label].sigmoid()), rel=1e-6)
    card = write_card(
        tmp_path / "x.onnx", read_source(tmp_path / "run"), InputRange(32), Difference(), None
    ).read_text()
    assert "mAP, %, in the run's evaluation" in card
    assert "sigmoid for the probability of each class" in card
    with pytest.raises(DataError, match="several classes each"):
        few_of_each(np.zeros((4, 3)), 3, 2)
    with pytest.raises(ConfigError, match=r"set metrics: \{multilabel"):
        train(config_from_mapping({**settings, "metrics": {}}), tmp_path / "other")


# --- what is refused -------------------------------------------------------------------------


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, r"loss.name = 'cross_entropy': expected bce beside metrics\.multilabel"),
    ({"loss": {"name": "bce", "class_weights": "balanced"}}, "class_weights = .*null or a list"),
    ({"sampling": "balanced"}, r"data.sampling = 'balanced': expected shuffle"),
    ({"distillation": {"teacher": "work_dirs/x"}}, "expected null beside metrics.multilabel"),
    (
        {"metrics": {"multilabel": {}, "accuracy": {}}, "loss": {"name": "bce"}},
        "metrics = .*expected no accuracy among them",
    ),
]


@pytest.mark.parametrize(("change", "expected"), WRONG)
def test_settings_of_one_class_are_refused(
    settings: Settings, change: dict[str, Any], expected: str
) -> None:
    if "sampling" in change:
        settings["data"]["sampling"] = change.pop("sampling")
    with pytest.raises(ConfigError, match=expected):
        config_from_mapping({**settings, "metrics": {"multilabel": {}}, **change})


def test_labels_and_metric_belong_together(settings: Settings) -> None:
    files = [Path("a"), Path("b")]
    rows: Any = np.array([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=np.uint8)
    several, single = Listing(files, rows, "abcd"), Listing(files, [0, 3], "abcd")
    plain = config_from_mapping(settings)
    both = config_from_mapping({**settings, "loss": {"name": "bce"}, "metrics": {"multilabel": {}}})
    check_labels(plain, single)
    check_labels(both, several)
    with pytest.raises(ConfigError, match=r"set metrics: \{multilabel: \{\}\} and loss\.name: bce"):
        check_labels(plain, several)
    with pytest.raises(ConfigError, match="images of one class each; leave the metric out"):
        check_labels(both, single)
