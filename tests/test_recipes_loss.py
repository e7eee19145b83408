"""Losses of recipes: binary cross-entropy, class weights, and learning from a teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from breadth import breadth
from conftest import CLASSES, settings_of
from processes import in_processes
from test_engine import NoReadback
from timm.loss import BinaryCrossEntropy

from kw.config import ConfigError, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.data import BatchPreprocessor
from kw.data.dataset import Listing
from kw.errors import UserError
from kw.models.losses import (
    balanced_weights,
    bce,
    cross_entropy,
    hard_distillation,
    soft_distillation,
)
from kw.training import build_trainer, load_checkpoint, train
from kw.training.distributed import Process
from kw.training.objective import build_loss

CPU = torch.device("cpu")
Settings = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor) -> None:
    """Values and gradients by the logits."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    mine, other = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)
    )
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-15)


def targets_of(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """As training makes them, in float64."""
    batch = {"images": torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), "labels": labels}
    preprocess = BatchPreprocessor(DataConfig("unused"), 5, smoothing)
    targets = preprocess(batch, training=True)[1]
    return targets.double() if targets.is_floating_point() else targets


# --- binary cross-entropy and class weights --------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_bce_is_timms(smoothing: float, threshold: float | None, sum_classes: bool) -> None:
    logits, labels = normal(7, 5).requires_grad_(), torch.tensor([0, 1, 4, 4, 2, 3, 0])
    theirs = BinaryCrossEntropy(smoothing, threshold, sum_classes=sum_classes)
    ours = bce(logits, targets_of(labels, smoothing), threshold, sum_classes)
    torch.testing.assert_close(ours, theirs(logits, labels), rtol=1e-6, atol=0)
    mixed = normal(7, 5, seed=1).softmax(1)  # of mixup: probabilities, which neither smooths
    assert_same(bce(logits, mixed, threshold, sum_classes), theirs(logits, mixed), logits)


def test_balanced_weights_are_scikit_learns() -> None:
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = np.repeat(np.arange(5), [1, 7, 20, 3, 100])
    expected = compute("balanced", classes=np.arange(5), y=labels)
    found = balanced_weights(labels.tolist(), 5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found, 131 / (5 * np.array([1, 7, 20, 3, 100])), rtol=1e-6)
    assert float(found[torch.tensor(labels)].mean()) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"no image is of class 5 \(2 of 7 classes\)"):
        balanced_weights(labels.tolist(), 7)


def test_weighted_cross_entropy_is_torchs() -> None:
    logits, weights = normal(6, 5).requires_grad_(), torch.tensor([0.5, 2, 0, 1, 3]).double()
    labels, mixed = torch.tensor([0, 1, 4, 4, 2, 3]), normal(6, 5, seed=1).softmax(1)
    assert_same(
        cross_entropy(logits, mixed, weights), F.cross_entropy(logits, mixed, weights), logits
    )
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(
            logits, labels, weights, reduction="sum", label_smoothing=smoothing
        )
        found = cross_entropy(logits, targets_of(labels, smoothing), weights)
        torch.testing.assert_close(found, expected / 6, rtol=1e-6, atol=0)
    one_hot = F.one_hot(labels, 5).double()
    assert_same(
        cross_entropy(logits, labels, weights), cross_entropy(logits, one_hot, weights), logits
    )
    # The same in micro-batches, whatever classes these have.
    halves = [cross_entropy(logits[i : i + 2], labels[i : i + 2], weights) for i in (0, 2, 4)]
    assert_same(torch.stack(halves).mean(), cross_entropy(logits, labels, weights), logits)
    assert cross_entropy(logits, labels, weights) != cross_entropy(logits, labels)


def test_weighted_bce_is_torchs() -> None:
    logits, weights = normal(6, 5).requires_grad_(), torch.tensor([0.5, 2, 0, 1, 3]).double()
    mixed = normal(6, 5, seed=1).softmax(1)
    theirs = F.binary_cross_entropy_with_logits(logits, mixed, weights)
    assert_same(bce(logits, mixed, class_weights=weights), theirs, logits)
    assert_same(bce(logits, mixed, None, True, weights), 5 * theirs, logits)


def test_weights_of_a_run(settings: Settings, images: Path) -> None:
    """Weights come from the training images or the file, and each class has its own."""
    listing = Listing([Path("x")] * 8, [0, 0, 0, 0, 1, 1, 2, 3], CLASSES)
    logits = torch.zeros(4, 4, requires_grad=True)
    for chosen, expected in (("balanced", [0.5, 1, 2, 2]), ([1, 0, 0.25, 3], [1, 0, 0.25, 3])):
        config = config_from_mapping({**settings, "loss": {"class_weights": chosen}})
        loss = build_loss(config, listing, CPU)(logits, torch.arange(4))
        (gradient,) = torch.autograd.grad(loss, logits)
        softmax = torch.full((4, 4), 0.25) - torch.eye(4)
        torch.testing.assert_close(gradient, softmax * torch.tensor(expected)[:, None] / 4)
    config = config_from_mapping({**settings, "loss": {"class_weights": "balanced"}})
    with pytest.raises(ConfigError, match=r"no image is of class 3 .*give a list"):
        build_loss(config, listing._replace(labels=[0, 1, 2, 2]), CPU)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"class_weights": [1, 2]}, r"class_weights = \[1.0, 2.0\]: expected 4 numbers.*num_classes"),
    ({"class_weights": [0, 0, 0, 0]}, "expected 4 numbers, not all 0"),
    ({"class_weights": [1, -1, 1, 1]}, "a list of numbers, each >= 0"),
    ({"class_weights": "balance"}, "one of 'balanced' or a list .* did you mean 'balanced'"),
    ({"class_weights": {"cat": 1}}, "one of 'balanced' or a list of numbers"),
    ({"args": {"class_weights": [1, 1, 1, 1]}}, "no class_weights among them"),
    # Every class would be present, or none.
    ({"name": "bce", "args": {"threshold": 0.0}}, r"a threshold between 0\.05 and 0\.85"),
    ({"name": "bce", "args": {"threshold": 0.85}}, r"a threshold between 0\.05 and 0\.85"),
]


@pytest.mark.parametrize(("loss", "expected"), WRONG)
def test_wrong_weights_are_refused(settings: Settings, loss: Any, expected: str) -> None:
    settings["label_smoothing"] = 0.2
    with pytest.raises(ConfigError, match=expected):
        config_from_mapping({**settings, "loss": loss})


def test_thresholds_between_the_targets(settings: Settings) -> None:
    for smoothing, threshold in ((0.0, 0.0), (0.0, 0.2), (0.2, 0.2)):
        loss = {"name": "bce", "args": {"threshold": threshold}}
        config_from_mapping({**settings, "label_smoothing": smoothing, "loss": loss})


def test_two_remedies_for_one_imbalance_are_refused(settings: Settings) -> None:
    settings["data"]["sampling"] = "balanced"
    config_from_mapping({**settings, "loss": {"class_weights": [1, 2, 3, 4]}})
    with pytest.raises(ConfigError, match=r"null or a list beside data\.sampling: balanced"):
        config_from_mapping({**settings, "loss": {"class_weights": "balanced"}})


# --- distillation ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_distillation_is_its_formula(temperature: float) -> None:
    logits, taught = 3 * normal(6, 5), 3 * normal(6, 5, seed=1)
    wanted, found = ((each / temperature).softmax(1) for each in (taught, logits))
    value = temperature**2 * (wanted * (wanted / found).log()).sum(1).mean()
    slope = temperature * (found - wanted) / 6
    for kind, precision in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        student = logits.to(kind).requires_grad_()
        loss = soft_distillation(student, taught.to(kind), temperature)
        torch.testing.assert_close(loss.double(), value, rtol=precision, atol=0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient.double() - slope).abs().max() < precision * slope.abs().max()
    assert abs(soft_distillation(taught, taught, temperature)) < 1e-15


def test_hard_distillation_is_its_formula() -> None:
    logits, taught = normal(6, 5).requires_grad_(), normal(6, 5, seed=1)
    chosen = taught.argmax(1)
    theirs = -logits.log_softmax(1)[torch.arange(6), chosen].mean()
    assert_same(hard_distillation(logits, taught), theirs, logits)


def static(settings: Settings, images: Path) -> Settings:
    """A static network with BatchNorm, which learns the grey that tells the class."""
    data = {**settings["data"], "memory": {}}  # read once, not in 16 epochs
    batch_norm = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    model = {"name": "resnet18", "num_classes": 4, "timm_args": batch_norm}
    settings = {**settings, "model": model, "temperature_epochs": 0, "eval_interval": 16}
    settings |= {"data": data, "epochs": 16}
    return {**settings, "optimizer": {**settings["optimizer"], "lr": 0.01}}


@pytest.fixture(scope="module")
def teacher(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run that tells the classes apart."""
    folder = tmp_path_factory.mktemp("teacher")
    metrics = train(config_from_mapping(static(settings_of(images), images)), folder)
    assert (metrics["top1"] or 0) > 90
    return folder


def taught(settings: Settings, teacher: Path, **more: Any) -> Settings:
    return {**settings, "distillation": {"teacher": str(teacher), **more}}


def log_of(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["mode"] == "train"]


@pytest.mark.parametrize("kind", breadth(["soft", "hard"], ["soft"]))
def test_a_student_learns_the_teachers_outputs(
    images: Path, teacher: Path, tmp_path: Path, kind: str
) -> None:
    """From images whose labels are all wrong: with alpha 1 they do not count."""
    root = tmp_path / "images"
    shutil.copytree(images / "val", root / "val")
    for place, name in enumerate(CLASSES):
        shutil.copytree(images / "train" / CLASSES[place - 1], root / "train" / name)
    settings = static(settings_of(root), root)
    student = taught(settings, teacher, alpha=1.0, kind=kind)
    metrics = train(config_from_mapping({**student, "seed": 1}), tmp_path / "student")
    assert (metrics["top1"] or 0) > 90
    learned = log_of(tmp_path / "student", "loss_teacher")
    assert np.mean(learned[-4:]) < 0.2 * np.mean(learned[:4])
    if kind == "hard":  # the share of the labels is the same formula for both
        return
    misled = taught(settings, teacher, alpha=0.01, kind=kind)
    metrics = train(config_from_mapping({**misled, "seed": 1}), tmp_path / "misled")
    assert (metrics["top1"] or 0) < 10


def test_the_teacher_stays_outside(settings: Settings, teacher: Path, tmp_path: Path) -> None:
    """Of the student's start, parameters, optimizer, average and checkpoint; it does not change."""
    settings |= {"ema": {"decay": 0.9}, "epochs": 1}
    settings["data"] |= {"mixup": 0.8}
    settings["model"]["timm_args"].pop("norm_layer")
    process = Process(0, 1, CPU)
    plain = build_trainer(config_from_mapping(settings), tmp_path / "plain", process)
    with_teacher = config_from_mapping(taught(settings, teacher, alpha=0.25, temperature=2.0))
    trainer = build_trainer(with_teacher, tmp_path / "student", process)
    state = trainer.task.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.task.network.state_dict().items())
    network = trainer.task.model.teacher.network  # type: ignore[union-attr, operator]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plain.run()
    trainer.run()
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    one, other = (load_checkpoint(tmp_path / n / "last.pth") for n in ("plain", "student"))
    for part in ("state_dict", "ema_state_dict"):
        assert one[part].keys() == other[part].keys()
    assert len(one["optimizer"]["optimizer"]["state"]) == len(
        other["optimizer"]["optimizer"]["state"]
    )
    results = [
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("plain", "student")
    ]
    assert results[0]["params"] == results[1]["params"]
    parts = [log_of(tmp_path / "student", key) for key in ("loss", "loss_labels", "loss_teacher")]
    for loss, labels, learned in zip(*parts, strict=True):
        assert loss == pytest.approx(0.75 * labels + 0.25 * learned, rel=1e-5)


def distil(process: Process, settings: Settings, folder: Path) -> None:
    build_trainer(config_from_mapping(settings), folder, process).run()


def test_two_processes_learn_as_one(settings: Settings, teacher: Path, tmp_path: Path) -> None:
    student = {**taught(settings, teacher), "epochs": 1}
    train(config_from_mapping(student), tmp_path / "one")
    in_processes(distil, 2, {**student, "batch_size": 8}, tmp_path / "two")
    for key in ("loss", "loss_teacher"):
        one, two = (log_of(tmp_path / name, key) for name in ("one", "two"))
        assert len(one) == 4
        assert two[0] == pytest.approx(one[0], rel=1e-5)
        assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_never_waits_for_the_device(
    settings: Settings, teacher: Path, tmp_path: Path, kind: str
) -> None:
    student = taught(settings, teacher, kind=kind)
    student |= {"precision": "bf16", "loss": {"class_weights": "balanced"}}
    trainer = build_trainer(config_from_mapping(student), tmp_path, Process(0, 1, CPU))
    batch = next(iter(trainer.train_loader))
    trainer.model.train()
    with NoReadback(), trainer.updater.forward(trainer.model):
        losses = trainer.model(batch)
        trainer.updater.backward(losses["loss"])
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_a_timm_network_teaches(settings: Settings, tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=4)
    torch.save(network.state_dict(), tmp_path / "good.pth")
    torch.save(timm.create_model("resnet18", num_classes=6).state_dict(), tmp_path / "six.pth")
    student = taught(settings, Path("resnet18"), weights=str(tmp_path / "good.pth"))
    trainer = build_trainer(config_from_mapping(student), tmp_path / "run", Process(0, 1, CPU))
    found = trainer.task.model.teacher.network  # type: ignore[union-attr, operator]
    assert all(torch.equal(found.state_dict()[k], v) for k, v in network.state_dict().items())
    student = taught(settings, Path("resnet18"), weights=str(tmp_path / "six.pth"))
    expected = r"teacher resnet18: .*another classifier: fc.weight \[4, 512\] \(\[6, 512\] in"
    with pytest.raises(UserError, match=expected):
        train(config_from_mapping(student), tmp_path / "other")


def test_teachers_that_do_not_fit(
    settings: Settings, images: Path, teacher: Path, tmp_path: Path
) -> None:
    def refused(settings: Settings, expected: str, kind: type[Exception] = UserError) -> None:
        with pytest.raises(kind, match=expected):
            train(config_from_mapping(settings), tmp_path / "run")

    other = {**settings, "data": {**settings["data"], "mean": [0.5, 0.5, 0.5]}}
    refused(taught(other, teacher), r"images of data\.mean \[0\.485.*set these to the teacher's")
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for split in ("train", "val"):
        (root / split / "fish").rename(root / split / "trout")
    other = {**settings, "data": {**settings["data"], "root": str(root)}}
    refused(taught(other, teacher), "other classes.* class 3 is 'fish' there and 'trout' here")
    refused(taught(settings, Path("resnet18")), "no such file.*a timm network needs its weights")
    named = taught(settings, Path("kw_resnet18_1x"), weights="timm")
    refused(named, "a static network; of a converted one give a run", ConfigError)
    named = taught(settings, Path("resnet81"), weights="timm")
    refused(named, "distillation.teacher = 'resnet81': .*did you mean", ConfigError)
