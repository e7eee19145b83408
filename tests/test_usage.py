"""What training uses of an annotation file: the model against mmdetection's own reader."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breadth import breadth
from coco_set import detector_text, write_coco_set
from PIL import Image
from processes import in_processes

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

from kw.config import ConfigError
from kw.data import DataError
from kw.detection import evaluate_checkpoint, load_detector_config, train
from kw.detection.annotations import load_annotations
from kw.detection.config import detection_limits
from kw.detection.data import build_eval_loader, build_train_loader
from kw.detection.pictures import write_pictures
from kw.detection.sets import class_names
from kw.detection.usage import Usage, why_unused
from kw.errors import OutOfMemory
from kw.training.distributed import Process

EPOCH = ["epochs=1", "schedule.milestones=[0.5]"]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco_set(tmp_path / "set")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float | None]]:
    """The checkpoint of an epoch on a set as ``coco`` is, and its figures; tests only read it."""
    coco = write_coco_set(tmp_path_factory.mktemp("trained") / "set")
    figures = train(config_of(coco, *EPOCH), coco.parent / "run")
    return coco.parent / "run" / "best.pth", figures


def config_of(coco: Path, *options: str, replace: tuple[str, str] = ("", "")) -> Any:
    path = coco.parent / "detector.py"
    path.write_text(detector_text(coco).replace(*replace))
    return load_detector_config(path, options)


def change(coco: Path, split: str = "train", **values: Any) -> dict[str, Any]:
    """Give all objects of a split other values."""
    file = coco / "annotations" / f"instances_{split}.json"
    content: dict[str, Any] = json.loads(file.read_text())
    for each in content["annotations"]:
        each.update(values)
    file.write_text(json.dumps(content))
    return content


def test_the_model_is_mmdetections_reader(coco: Path) -> None:
    """Of objects with every fault and each pair of faults, the same are left."""
    file = coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    rng = np.random.default_rng(0)
    faults: list[dict[str, Any]] = [
        {"area": 0},
        {"area": -1},
        {"ignore": 1},
        {"ignore": 0},
        {"iscrowd": 1},
        {"bbox": [10, 10, 0.9, 30]},
        {"bbox": [10, 10, 30, 0]},
        {"bbox": [10, 10, 1, 1]},
        {"bbox": [-30, 10, 30, 30]},
        {"bbox": [-30, 10, 30.5, 30]},
        {"bbox": [96, 10, 30, 30]},
        {"bbox": [10, 79.5, 30, 30]},
        {"bbox": [10, 10, -5, 30]},
    ]
    content["annotations"] = [
        {**each, **faults[int(rng.integers(len(faults)))], **faults[place % len(faults)], "id": n}
        for n, (place, each) in enumerate(enumerate(content["annotations"] * 20), 1)
    ]
    content["images"][0].update(width=31, height=80)
    file.write_text(json.dumps(content))
    config = config_of(coco, "total_batch_size=2")
    loader = build_train_loader(config, ["blue", "green"], 0, 1)
    dataset: Any = loader.dataset.dataset
    used = sum(
        not each["ignore_flag"]
        for i in range(len(dataset))
        for each in dataset.get_data_info(i)["instances"]
    )
    sizes = {each["id"]: (each["width"], each["height"]) for each in content["images"]}
    usage = Usage.of(content["annotations"], {7: "blue", 4: "green"}, sizes, min_size=32)
    assert usage.used.total() == used > 0
    assert len(usage.reasons) >= 5
    assert all(info["instances"] for info in map(dataset.get_data_info, range(len(dataset))))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"area": 0}, "area 0, where the pixels"),
        ({"iscrowd": 1}, "iscrowd 1, a region to ignore"),
        ({"ignore": 1}, "ignore 1"),
        ({"bbox": [0.1, 0.1, 0.5, 0.5]}, "narrower than a pixel"),
    ],
)
def test_training_on_nothing_is_refused(coco: Path, values: dict[str, Any], reason: str) -> None:
    number = len(change(coco, **values)["annotations"])
    for options in ([], ["data.check=false"]):
        with pytest.raises(DataError, match=rf"0 of {number} objects are used; .*{reason}"):
            train(config_of(coco, *EPOCH, *options), coco.parent / "run")


def test_training_on_small_images_alone_is_refused(coco: Path) -> None:
    config = config_of(coco, "data.min_size=90")
    with pytest.raises(DataError, match=r"data\.min_size"):
        train(config, coco.parent / "run")


def test_what_is_left_out_is_said(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    reds = [each for each in content["annotations"] if each["category_id"] == 2]
    for each in reds:
        each["area"] = 0
    file.write_text(json.dumps(content))
    total = len(content["annotations"])
    caplog.set_level(logging.INFO, "kw")
    train(config_of(coco, *EPOCH), coco.parent / "run")
    told = re.sub(r"\s+", " ", caplog.text)
    assert f"{total - len(reds)} of {total} objects are used; left out: {len(reds)} area 0" in told
    assert f"none is left of: red ({len(reds)})" in told
    assert f"{len(reds)} objects that training leaves out" in told  # the check's warnings


def test_a_set_to_test_on_needs_objects(coco: Path, trained: Any) -> None:
    change(coco, "val", iscrowd=1)
    for options in (EPOCH, [*EPOCH, "data.check=false"]):
        with pytest.raises(DataError, match="no object"):
            train(config_of(coco, *options), coco.parent / "other")
    with pytest.raises(DataError, match=r"no object to evaluate against \(of red, green, blue"):
        evaluate_checkpoint(config_of(coco, "data.check=false"), trained[0])


def test_a_bom_and_a_category_listed_twice(coco: Path, trained: Any) -> None:
    """Training, check and evaluation read the same content."""
    for split in ("train", "val"):
        file = coco / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"].insert(0, {"id": 1, "name": "blue"})
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert train(config_of(coco, *EPOCH), coco.parent / "run") == trained[1]


def test_more_objects_than_detections(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kw")
    file = coco / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    first = content["annotations"][0]
    square = [[0, 0, 40, 0, 40, 40, 0, 40]]
    more = [
        {**first, "id": 1000 + i, "bbox": [i % 40, i // 40, 20, 20], "segmentation": square}
        for i in range(120)
    ]
    content["annotations"] += more
    file.write_text(json.dumps(content))
    config = config_of(coco, *EPOCH, "data.check=false")
    figures = train(config, coco.parent / "run")
    assert "bbox_AR_100" in figures
    text = re.sub(r"\s+", " ", caplog.text)
    assert "1 images have more than 10 objects (image 100: 121), of which 10 can be found" in text

    caplog.clear()
    config = config_of(coco, *EPOCH, "data.max_detections=150")
    assert config.model["test_cfg"]["rcnn"]["max_per_img"] == 150
    figures = evaluate_checkpoint(config, coco.parent / "run" / "best.pth")
    assert figures.keys() & {"bbox_AR_150", "bbox_AR_100"} == {"bbox_AR_150"}
    assert "can be found" not in caplog.text
    with pytest.raises(ConfigError, match=r"data\.max_detections.*>= 100"):
        config_of(coco, "data.max_detections=99")
    bare = ("    test_cfg=dict(", "    _test_cfg=dict(")
    with pytest.raises(ConfigError, match="has no max_per_img to set"):
        config_of(coco, "data.max_detections=150", "model.test_cfg={_delete_: true}", replace=bare)


def turn(coco: Path) -> None:
    """Store all images lying, with the mark that turns them upright; the files stay right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in sorted(coco.glob("*/*.png")):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def test_photos_that_lie(coco: Path) -> None:
    """Sizes of the files as stored are refused, whether the check looks or not; boxes that lie too
    are right with the orientation ignored."""
    config = config_of(coco)
    plain = build_eval_loader(config, class_names(config.run.data), 0, 1).dataset[0, 1]
    turn(coco)
    same = build_eval_loader(config, class_names(config.run.data), 0, 1).dataset[0, 1]
    assert (plain["inputs"] == same["inputs"]).all()
    file = coco / "annotations" / "instances_train.json"
    content = load_annotations(file)
    for image in content["images"]:
        image.update(width=image["height"], height=image["width"])
    boxes = {}
    for each in content["annotations"]:
        width = next(i["height"] for i in content["images"] if i["id"] == each["image_id"])
        x, y, w, h = boxes[each["id"]] = each["bbox"]
        x, y, w, h = y, width - x - w, h, w
        each.update(bbox=[x, y, w, h])
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    file.write_text(json.dumps(content))
    for options, message in (([], "image-size-turned"), (["data.check=false"], "would lie else")):
        with pytest.raises(DataError, match=message):
            train(config_of(coco, *EPOCH, *options), coco.parent / "run")
    lying = config_of(coco, "data.exif_orientation=ignore", "data.bad_images.policy=raise")
    samples: Any = build_train_loader(lying, class_names(lying.run.data), 0, 1).dataset
    steps = samples.dataset.pipeline.transforms[:2]
    seen = 0
    for index in range(len(samples)):
        results = samples.dataset.get_data_info(index)
        for step in steps:
            results = step(results)
        for box, label in zip(
            results["gt_bboxes"].tensor, results["gt_bboxes_labels"], strict=True
        ):
            x, y, right, bottom = map(int, box)
            patch = results["img"][y + 2 : bottom - 2, x + 2 : right - 2].reshape(-1, 3)
            colour = ("red", "green", "blue")[label]
            seen += int(np.median(patch, axis=0).argmax() == ("blue", "green", "red").index(colour))
    assert seen >= 0.8 * len(boxes)  # others lie below one of another colour


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'dict(type="RandomFlip", prob=0.5)',
            'dict(type="Mosaic", img_scale=(96, 96))',
            "train_pipeline: Mosaic mixes several images",
        ),
        (
            'dict(type="RandomFlip", prob=0.5)',
            'dict(type="RandomShift")',
            "train_pipeline: RandomShift moves boxes, but not masks",
        ),
        (
            '"RandomChoiceResize", ',
            '"RandomChoiceResize", resize_type="FixScaleResize", ',
            "train_pipeline: FixScaleResize rounds .* a row or column larger: use Resize",
        ),
        (
            'dict(type="RandomFlip", prob=0.5)',
            'dict(type="LoadAnnotations", with_mask=True, poly2mask=False), '
            'dict(type="RandAugment", aug_num=1)',
            r"train_pipeline: Rotate turns polygons about a corner.*poly2mask=True",
        ),
        (
            'dict(type="LoadAnnotations", with_bbox=True, with_mask=True),',
            "",
            "train_pipeline gives no bboxes, labels, masks: it needs LoadAnnotations with ",
        ),
        (', with_mask=True', "", "train_pipeline gives no masks"),
        (
            'dict(type="RandomFlip", prob=0.5)',
            'dict(type="FilterAnnotations", min_gt_bbox_wh=(999, 999))',
            r"train_\d.png: train_pipeline left no object in 20 tries, nor in those of other",
        ),
        (
            'dict(type="RandomFlip", prob=0.5)',
            'dict(type="RandomCrop", crop_size=(999, 999), crop_type="absolute", nothing=1)',
            "train_pipeline: mmdetection cannot build it: TypeError",
        ),
        (
            'dict(type="RandomFlip", prob=0.5)',
            'dict(type="Resize", scale=(0, 0))',
            r"train_\d.png: train_pipeline fails on it: ",
        ),
        ("dict(type=\"PackDetInputs\"),\n]", "]", "train_pipeline: expected to load an image and"),
        ('meta_keys=("img_id", ', "meta_keys=(", "test_pipeline gives no img_id: it needs Pack"),
    ],
)  # fmt: skip
def test_pipelines(coco: Path, old: str, new: str, message: str) -> None:
    text = detector_text(coco)
    assert text.count(old) == 1
    run = coco.parent / "run"
    with pytest.raises((ConfigError, DataError), match=message):
        train(config_of(coco, *EPOCH, "data.check=false", replace=(old, new)), run)
    assert not (run / "log.jsonl").exists()  # before anything is trained


def test_an_image_that_keeps_no_object_is_replaced(coco: Path) -> None:
    """By one that keeps some, the same each time: mmdetection takes another one as well."""
    file = coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for each in content["annotations"]:
        each["bbox"][2:] = (9, 9) if each["image_id"] == 101 else (20, 20)
    file.write_text(json.dumps(content))
    filters = 'dict(type="RandomFlip", prob=0.5), dict(type="FilterAnnotations", '
    filters += "min_gt_bbox_wh=(15, 15))"
    config = config_of(coco, replace=('dict(type="RandomFlip", prob=0.5)', filters))
    samples: Any = build_train_loader(config, class_names(config.run.data), 0, 1).dataset
    taken = [Path(samples[0, index]["data_samples"].img_path).name for index in range(7)]
    assert "train_1.png" not in taken
    assert [name for i, name in enumerate(taken) if i != 1] == [
        f"train_{i}.png" for i in range(7) if i != 1
    ]
    first, again = samples[0, 1], samples[0, 1]
    assert torch.equal(first["inputs"], again["inputs"])


def test_machines_with_other_annotations_do_not_begin(coco: Path, trained: Any) -> None:
    """A file that lacks an object, on one of them."""
    other = coco.parent / "other"
    shutil.copytree(coco, other)
    content = change(other, "val")
    content["annotations"].pop()
    (other / "annotations/instances_val.json").write_text(json.dumps(content))
    configs = [config_of(coco), config_of(other)]

    def begin(process: Process) -> None:
        config, run = configs[process.rank], coco.parent / "run"
        for use in (
            lambda: train(config, run, launcher="pytorch"),
            lambda: evaluate_checkpoint(config, trained[0], launcher="pytorch"),
        ):
            with pytest.raises(
                DataError, match=r"1 lists 5 images of \S*val.json, .* or other lab"
            ):
                use()

    in_processes(begin, 2)


def test_masks_are_turned_as_their_boxes_are(coco: Path) -> None:
    turned = ('dict(type="RandomFlip", prob=0.5)', 'dict(type="Rotate", prob=1.0)')
    config = config_of(coco, replace=turned)
    samples: Any = build_train_loader(config, class_names(config.run.data), 0, 1, True).dataset
    for index in range(len(samples)):
        objects = samples[0, index]["data_samples"].gt_instances
        boxes, hulls = objects.bboxes.tensor, objects.masks.get_bboxes("hbox").tensor
        assert (boxes - hulls).abs().max() < 3


@pytest.mark.parametrize(
    ("values", "message"),
    breadth(
        [
            ({"image_id": "100"}, "values of a wrong kind"),
            ({"bbox": None}, "boxes that are not four finite numbers"),
            (
                {"segmentation": [1, 2, 3, 4, 5, 6]},
                "masks that are neither polygons nor run lengths",
            ),
            ({"iscrowd": None}, "values of a wrong kind"),
            ({"ignore": "0"}, "values of a wrong kind"),
            ({"bbox": [0, 0, 10**400, 5]}, "boxes that are not four finite numbers"),
        ],
        [({"bbox": None}, "boxes that are not four finite numbers")],
    ),
)
def test_a_set_is_checked_before_it_is_tested_on(
    coco: Path, trained: Any, values: dict[str, Any], message: str
) -> None:
    change(coco, "val", **values)
    checkpoint, _ = trained
    for use in (
        lambda: evaluate_checkpoint(config_of(coco), checkpoint),
        lambda: write_pictures(config_of(coco), checkpoint, coco.parent / "pictures"),
    ):
        with pytest.raises(DataError, match=message):
            use()


def test_queries_and_detections(coco: Path) -> None:
    text = detector_text(coco) + "model['num_queries'] = 120\n"
    path = coco.parent / "queries.py"
    path.write_text(text)
    config = load_detector_config(path, ["data.max_detections=110"])
    assert sorted(detection_limits(config.model)) == [110, 120]
    with pytest.raises(ConfigError, match=r"model\.num_queries is 120, and a detector finds"):
        load_detector_config(path, ["data.max_detections=300"])
    assert detection_limits({"test_cfg": {"max_per_img": -1}}) == []


def test_reasons() -> None:
    each = {"bbox": [0, 0, 10, 10], "area": 100}
    assert why_unused(each, (50, 40)) is None
    assert why_unused(each, (50, 30), min_size=32) == (
        "in an image with a side under 32 pixels (data.min_size)"
    )
    assert why_unused({**each, "area": 0}, (50, 40), training=False) is None
    assert "iscrowd" in str(why_unused({**each, "iscrowd": 1}, (50, 40), training=False))


def test_an_image_too_large_for_memory_is_named(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(coco)
    samples = build_eval_loader(config, class_names(config.run.data), 0, 1).dataset

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("kw.detection.data.read_image", fail)
    with pytest.raises(OutOfMemory, match=r"out of memory with \S*val_1.png: no more .*max_pixels"):
        samples[0, 1]


def test_a_reading_that_cannot_leave_pictures_as_stored_is_refused(coco: Path) -> None:
    own = (
        'dict(type="LoadImageFromFile")',
        'dict(type="LoadImageFromFile", color_type="grayscale")',
    )
    for options, refused in ((["data.exif_orientation=ignore"], True), ([], False)):
        config = config_of(coco, *options, replace=own)
        classes = class_names(config.run.data)
        if refused:
            with pytest.raises(ConfigError, match=r"exif_orientation=ignore has no effect on Load"):
                build_train_loader(config, classes, 0, 1)
        else:
            assert len(build_train_loader(config, classes, 0, 1)) > 0
