"""Detectors through the same tools as classifiers: train, resume, evaluate, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from coco_set import detector_text, write_coco_set

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from PIL import Image
from processes import call, in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kw.config import ConfigError
from kw.data import DataError
from kw.detection import evaluate_checkpoint, load_detector_config, train, write_pictures
from kw.detection.data import Samples, build_train_loader
from kw.detection.evaluation import FIGURES, CocoEvaluator
from kw.detection.run import evaluate_detector
from kw.detection.sets import class_names, write_subset
from kw.training import CheckpointError, load_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco_set(tmp_path_factory.mktemp("coco") / "set")


@pytest.fixture
def file(coco: Path, tmp_path: Path) -> Path:
    path = tmp_path / "detector.py"
    path.write_text(detector_text(coco))
    return path


@pytest.fixture(scope="module")
def trained(coco: Path) -> Path:
    """The last checkpoint of an epoch; tests only read it."""
    file = coco.parent / "trained.py"
    file.write_text(detector_text(coco))
    options = ["epochs=1", "schedule.milestones=[0.5]"]
    train(load_detector_config(file, options), coco.parent / "trained")
    return coco.parent / "trained" / "last.pth"


def log_of(work_dir: Path, mode: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["mode"] == mode]


def test_a_run_leaves_what_is_promised(file: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "run"
    config = load_detector_config(file, ["ema={decay: 0.5}", "precision=bf16"])
    metrics = train(config, work_dir)
    names = {path.name for path in work_dir.iterdir()}
    assert {"config.py", "log.jsonl", "tensorboard", "best.pth", "results.json"} <= names
    results = json.loads((work_dir / "results.json").read_text())
    assert {f"{kind}_{f}" for kind in ("bbox", "segm") for f in FIGURES} <= results.keys()
    assert results["weights"] == "ema"
    lines = log_of(work_dir, "train")
    assert [line["iter"] for line in lines] == [1, 2]  # 7 images with objects, 4 an update
    assert {"loss", "loss_rpn_cls", "loss_mask", "lr", "images_per_second"} <= lines[0].keys()
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 1e-4])
    tags = EventAccumulator(str(work_dir / "tensorboard")).Reload().Tags()["scalars"]
    assert {"train/loss_mask", "val/bbox_mAP", "val/ema_segm_mAP"} <= set(tags)
    told = MessageHub.get_current_instance()  # what losses of mmdetection's ask for
    assert [told.get_info(key) for key in ("epoch", "iter", "max_iters")] == [1, 2, 2]
    checkpoint = load_checkpoint(work_dir / "epoch_2.pth")  # weights_only
    assert checkpoint["meta"]["classes"] == ["red", "green", "blue"]

    again = evaluate_checkpoint(
        load_detector_config(file, ["precision=bf16"]), work_dir / "last.pth"
    )
    assert again["bbox_mAP"] == metrics["ema_bbox_mAP"]
    assert again["model_segm_mAP"] == metrics["segm_mAP"]
    # The resolved configuration is enough, wherever the weights of the backbone have gone.
    assert evaluate_checkpoint(load_detector_config(work_dir / "config.py"), work_dir / "best.pth")


def test_resuming_is_exact(file: Path, tmp_path: Path) -> None:
    """With random crops of proposals, flips, sizes and drop path."""
    options = ["ema={decay: 0.5}", "model.backbone.drop_path_rate=0.2"]
    config = load_detector_config(file, options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    parts.mkdir()
    shutil.copy(whole / "epoch_1.pth", parts)
    shutil.copy(whole / "log.jsonl", parts)
    train(config, parts, resume=True)
    expected, found = (load_checkpoint(d / "epoch_2.pth") for d in (whole, parts))
    for key in ("state_dict", "ema_state_dict"):
        different = [k for k, v in expected[key].items() if not torch.equal(v, found[key][k])]
        assert not different
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config, whole)


def test_what_an_image_looks_like_depends_on_its_key_alone(file: Path) -> None:
    config = load_detector_config(file)
    loader = build_train_loader(config, class_names(config.run.data), 0, 1)
    samples: Any = loader.dataset
    assert isinstance(samples, Samples)
    first, torch_state = samples[(0, 1)], torch.get_rng_state()
    samples[(1, 2)]
    again = samples[(0, 1)]
    assert torch.equal(first["inputs"], again["inputs"])
    assert torch.equal(torch.get_rng_state(), torch_state)
    looks = {samples[(epoch, 1)]["inputs"].shape for epoch in range(8)}
    assert len(looks) > 1
    # Labels follow data.classes, not the order of the annotation file.
    boxes = first["data_samples"].gt_instances
    colour = first["inputs"][
        :, int(boxes.bboxes.tensor[0, 1]) + 4, int(boxes.bboxes.tensor[0, 0]) + 4
    ]
    assert int(colour.argmax()) == 2 - int(boxes.labels[0])  # BGR; red, green, blue


class OwnGenerator:
    """Albumentations' Compose: it draws from no generator but its own, of no seed at first."""

    def __init__(self, transforms: Any, bbox_params: Any) -> None:
        self.set_random_seed(None)

    def set_random_seed(self, seed: int | None) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, image: Any, **others: Any) -> dict[str, Any]:
        return {"image": image + self.generator.integers(256, dtype=np.uint8), **others}


def test_transforms_with_generators_of_their_own_depend_on_the_key_too(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https://github.com/albumentations-team/AlbumentationsX/issues/266"""
    monkeypatch.setattr("mmdet.datasets.transforms.transforms.Compose", OwnGenerator)
    albu = "{type: RandomApply, prob: 1, transforms: [{type: Albu, transforms: []}]}"
    reads = "{type: LoadImageFromFile}, {type: LoadAnnotations, with_bbox: true}"
    pipeline = f"train_pipeline=[{reads}, {albu}, {{type: PackDetInputs}}]"
    config = load_detector_config(file, [pipeline])
    found: list[Any] = []
    for order in ((0, 1, 2), (2, 0, 1)):  # as in several processes, or a resumed run
        samples: Any = build_train_loader(config, class_names(config.run.data), 0, 1).dataset
        found.append({epoch: samples[epoch, 1]["inputs"] for epoch in order})
    assert all(torch.equal(found[0][epoch], found[1][epoch]) for epoch in range(3))
    assert len({int(image[0, 0, 0]) for image in found[0].values()}) > 1


def test_micro_batches_of_one_aspect(file: Path) -> None:
    """Grouping moves images between the micro-batches of an update and no further."""
    orders = {}
    for grouped in ("true", "false"):
        config = load_detector_config(file, [f"data.group_by_aspect={grouped}"])
        loader = build_train_loader(config, class_names(config.run.data), 0, 1)
        sampler: Any = loader.batch_sampler
        dataset: Any = loader.dataset
        orders[grouped] = [[index for _, index in batch] for batch in sampler]
    update = {index for batch in orders["true"] for index in batch}
    assert update == {index for batch in orders["false"] for index in batch}
    infos = [dataset.dataset.get_data_info(i) for i in range(len(dataset))]
    wide = [[infos[i]["width"] > infos[i]["height"] for i in batch] for batch in orders["true"]]
    assert sum(len(set(batch)) > 1 for batch in wide) <= 1


def test_two_processes(file: Path, tmp_path: Path) -> None:
    """They train as one model, and evaluate to the figures of one process."""
    work_dir, results = tmp_path / "two", tmp_path / "results.json"
    call("tools/train.py", file, "--work-dir", work_dir, processes=2)
    assert len(log_of(work_dir, "train")) == 2
    call("tools/test.py", file, work_dir / "last.pth", "--json", results)
    alone, together = json.loads(results.read_text()), log_of(work_dir, "val")[-1]
    for key, value in together.items():
        if "mAP" in key or "AR_" in key:
            assert alone[key] == value, key


def train_with(process: Any, file: Path, work_dir: Path, strategy: str) -> None:
    options = [f"distributed.strategy={strategy}", "optimizer.clip_grad=1"]
    train(load_detector_config(file, options), work_dir, launcher="pytorch")


@pytest.mark.slow  # test_parallel.py shards a classifier
def test_a_sharded_detector_is_the_same(file: Path, tmp_path: Path) -> None:
    logs = []
    for strategy in ("ddp", "fsdp"):
        in_processes(train_with, 2, file, tmp_path / strategy, strategy)
        logs.append(log_of(tmp_path / strategy, "train"))
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert evaluate_checkpoint(load_detector_config(file), tmp_path / "fsdp" / "best.pth")


def test_bad_data_are_refused_before_training(coco: Path, file: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(coco, tmp_path / "broken")
    annotations = broken / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"] = [500, 500, 10, 10]
    content["annotations"][1]["segmentation"] = [[1, 2, 3]]
    content["annotations"][2]["id"] = content["annotations"][3]["id"]
    annotations.write_text(json.dumps(content))
    (broken / "train" / "train_3.png").unlink()
    config = load_detector_config(file, [f"data.root={broken}"])
    with pytest.raises(DataError) as error:
        train(config, tmp_path / "run")
    for words in ("outside of their image", "polygon", "used twice", "files missing"):
        assert words in str(error.value)
    with pytest.raises(DataError, match=r"no category purple.*red, green, blue"):
        train(load_detector_config(file, ["data.classes=[red, purple]"]), tmp_path / "run")


def test_a_checkpoint_of_another_detector(file: Path, trained: Path, tmp_path: Path) -> None:
    wider = ["model.roi_head.bbox_head.fc_out_channels=48"]
    with pytest.raises(CheckpointError, match="another model"):
        evaluate_checkpoint(load_detector_config(file, wider), trained)
    done = call("tools/test.py", file, tmp_path / "none.pth", status=2)
    assert done.stderr.startswith("error: checkpoint")
    assert "Traceback" not in done.stderr


def test_checking_by_configuration(coco: Path, file: Path, tmp_path: Path) -> None:
    """What training refuses, before training: one list, exit status 2."""
    call("tools/check_coco.py", file)
    broken = shutil.copytree(coco, tmp_path / "broken")
    (broken / "train" / "train_0.png").write_bytes(b"")
    (broken / "val" / "val_1.png").unlink()
    options = ["--cfg-options", f"data.root={broken}"]
    done = call("tools/check_coco.py", file, *options, "--json", tmp_path / "found.json", status=2)
    assert "train_0.png" in done.stdout
    assert "val_1.png" in done.stdout
    assert done.stderr.startswith("error: errors in")
    assert len(json.loads((tmp_path / "found.json").read_text())) == 2


def test_a_part_of_a_set(coco: Path, tmp_path: Path) -> None:
    source, target = coco / "annotations" / "instances_train.json", tmp_path / "part.json"
    part = write_subset(source, target, 3)
    assert json.loads(target.read_text()) == part
    assert [image["id"] for image in part["images"]] == [100, 101, 102]
    assert {each["image_id"] for each in part["annotations"]} == {100, 101, 102}
    with pytest.raises(DataError, match="has 7 images with objects, fewer than 8"):
        write_subset(source, target, 8)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_boxes_that_are_not_finite_are_wrong(
    coco: Path, caplog: pytest.LogCaptureFixture, bad: float
) -> None:
    """And the run goes on. Behind one of them the right one has half of the precision."""
    truth = json.loads((coco / "annotations" / "instances_val.json").read_text())
    truth["annotations"] = truth["annotations"][:1]
    (each,) = truth["annotations"]
    file = coco / "annotations" / "one.json"
    file.write_text(json.dumps(truth))
    left, top, width, height = each["bbox"]
    right = [left, top, left + width, top + height]
    evaluator = CocoEvaluator(file)
    label = evaluator.classes.index(
        next(c["name"] for c in truth["categories"] if c["id"] == each["category_id"])
    )

    class Detector(nn.Linear):
        def val_step(self, batch: Any) -> list[Any]:
            found = InstanceData(
                bboxes=torch.tensor([[0, 0, bad, bad], right]),
                scores=torch.tensor([0.9, 0.8]),
                labels=torch.tensor([label, label]),
            )
            return [DetDataSample(metainfo={"img_id": each["image_id"]}, pred_instances=found)]

    class OneBatch(list[Any]):
        batch_sampler = SimpleNamespace(indices=[0])

    loader: Any = OneBatch([{}])
    caplog.set_level("INFO", "kw")
    figures = evaluate_detector(Detector(1, 1), loader, evaluator, "fp32")
    assert figures["bbox_mAP"] == pytest.approx(0.5)
    assert "1 detections with a box or a score that is not finite count as wrong" in caplog.text


def test_pictures(file: Path, trained: Path, tmp_path: Path) -> None:
    """Predictions beside the truth, one picture an image; the last has no object."""
    out = tmp_path / "pictures"
    written = write_pictures(load_detector_config(file), trained, out, images=99, score=0.0)
    assert [path.name for path in written] == [f"val_{i}.png" for i in range(5)] + ["sheet.png"]
    sizes = {path.name: Image.open(path).size for path in written}
    assert sizes["val_1.png"][0] > 2 * sizes["val_1.png"][1]  # two 96 x 64 images side by side
    annotated = np.asarray(Image.open(written[0]).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(annotated, axis=0)) > 50
