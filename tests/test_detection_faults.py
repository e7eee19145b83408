"""Detection's images: read as OpenCV reads them, replaced and left out as classification's are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_set import detector_text, write_coco_set
from PIL import Image

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

from mmcv.transforms import LoadImageFromFile

from kw.data import DataError
from kw.detection import load_detector_config, train
from kw.detection.data import LoadImage, build_eval_loader, build_train_loader
from kw.detection.mmdet import register_all_modules
from kw.detection.sets import class_names


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A set with one training and one test image that end too early."""
    root = write_coco_set(tmp_path / "set")
    for name in ("train/train_2.png", "val/val_1.png"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    return root


def config_of(coco: Path, tmp_path: Path, *options: str) -> Any:
    path = tmp_path / "detector.py"
    path.write_text(detector_text(coco))
    return load_detector_config(path, options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("jpg", {}), ("jpg", {"subsampling": 0}), ("jpg", {"progressive": True}), ("png", {})],
)
def test_pixels_are_opencvs(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, more in (("plain", {}), ("turned", {"exif": exif}), ("grey", {})):
        path = tmp_path / f"{name}.{kind}"
        (image.convert("L") if name == "grey" else image).save(path, **options, **more)
        theirs = LoadImageFromFile()
        expected = theirs({"img_path": str(path)})
        found = LoadImage(theirs, 10**6)({"img_path": str(path)})
        assert expected is not None
        if (name, kind) != ("turned", "png"):  # OpenCV's reading of EXIF in PNG depends on its age
            np.testing.assert_array_equal(found["img"], expected["img"])
            assert found["img_shape"] == expected["img_shape"]
        assert found["ori_shape"] == found["img"].shape[:2]
    assert (
        LoadImage(LoadImageFromFile(to_float32=True), 10**6)({"img_path": str(path)})["img"].dtype
        == np.float32
    )


def test_substitutes_and_what_is_left_out(coco: Path, tmp_path: Path) -> None:
    register_all_modules(init_default_scope=True)
    config = config_of(coco, tmp_path, "data.bad_images={max_fraction: 0.5}")
    classes = class_names(config.run.data)
    loader = build_train_loader(config, classes, 0, 1)
    dataset: Any = loader.dataset
    bad = next(i for i in range(len(dataset)) if dataset.path(i).endswith("train_2.png"))
    first, again = dataset[1, bad], dataset[1, bad]
    assert torch.equal(first.sample["inputs"], again.sample["inputs"])
    assert first.faults[0].path.endswith("train_2.png")
    assert "truncated" in first.faults[0].reason
    assert all(len(batch["inputs"]) == 2 for batch in loader)

    batches = list(build_eval_loader(config, classes, 0, 1))
    ids = [sample.img_id for batch in batches for sample in batch["data_samples"]]
    assert sorted(ids) == [100, 102, 103, 104]
    config.run.data.bad_images.policy = "raise"
    with pytest.raises(DataError, match=r"cannot read image \S*val_1.png.*truncated"):
        list(build_eval_loader(config, classes, 0, 1))


def test_a_run_goes_on_and_tells(coco: Path, tmp_path: Path) -> None:
    options = ["data.bad_images={max_fraction: 0.5}", "epochs=1", "schedule.milestones=[0.5]"]
    metrics = train(config_of(coco, tmp_path, *options), tmp_path / "run")
    assert metrics["unreadable_images"] == 1
    listed = (tmp_path / "run" / "bad_images.txt").read_text()
    assert "val_1.png" in listed
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    told = [line for line in lines if line["mode"] == "bad_image"]
    assert {line["split"] for line in told} >= {"val"}
