"""The detection demo's data: what is annotated is what is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from kw.data import digits
from kw.data.digit_scenes import (
    LARGEST,
    LEAST_VISIBLE,
    SHAPES,
    SMALLEST,
    compose_scene,
    encode_mask,
    main,
    write_digit_scenes,
)
from kw.objects.run_lengths import segmentation_mask

SIZES = {"train": 40, "val": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "digit_scenes"
    assert write_digit_scenes(folder, **SIZES) == SIZES
    return folder


def read(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def masks_of(content: dict[str, Any], image: dict[str, Any]) -> list[np.ndarray]:
    return [
        segmentation_mask(entry["segmentation"], image["height"], image["width"])
        for entry in content["annotations"]
        if entry["image_id"] == image["id"]
    ]


@pytest.mark.parametrize("split", SIZES)
def test_files_are_as_coco_has_them(root: Path, split: str) -> None:
    content = read(root, split)
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (digit + 1, str(digit)) for digit in range(10)
    ]
    assert len(content["images"]) == SIZES[split] == len(list((root / split).iterdir()))
    for image in content["images"]:
        with Image.open(root / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.mode == "RGB"
        assert (image["height"], image["width"]) in SHAPES
    assert {image["height"] for image in content["images"]} == {shape[0] for shape in SHAPES}
    for table in ("images", "annotations"):
        assert [row["id"] for row in content[table]] == list(range(1, len(content[table]) + 1))


def test_boxes_and_areas_are_those_of_the_masks(root: Path) -> None:
    content = read(root, "train")
    masks = [mask for image in content["images"] for mask in masks_of(content, image)]
    assert len(masks) == len(content["annotations"]) > 60
    for entry, mask in zip(content["annotations"], masks, strict=True):
        rows, columns = np.nonzero(mask)
        x, y, width, height = entry["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
        assert entry["area"] == mask.sum()
        assert entry["iscrowd"] == 0
        assert height <= LARGEST * 1.1
    heights = [entry["bbox"][3] for entry in content["annotations"]]
    assert max(heights) > 2 * min(heights)


def test_a_pixel_is_of_one_digit_and_shows_it(root: Path) -> None:
    content = read(root, "train")
    for image in content["images"]:
        masks = masks_of(content, image)
        if not masks:
            continue
        assert np.sum(masks, 0).max() == 1
        pixels = np.asarray(Image.open(root / "train" / image["file_name"])).max(2)
        for mask in masks:
            # Ink is brighter than any background; at its edges they are mixed.
            assert np.median(pixels[mask]) > 150
        assert np.median(pixels[~np.any(masks, 0)]) < 120


def test_later_digits_cover_earlier_ones() -> None:
    """Squares: what one lacks is under a later one, and most of each is to be seen."""
    full, label = np.full((1, 8, 8), 255, np.uint8), np.zeros(1, int)
    covered = 0
    for seed in range(40):
        scene = compose_scene(full, label, [0], np.random.RandomState(seed))
        for place, mask in enumerate(scene.masks):
            rows, columns = np.nonzero(mask)
            inside = np.zeros_like(mask)  # corners are round
            inside[rows.min() + 3 : rows.max() - 2, columns.min() + 3 : columns.max() - 2] = True
            missing = inside & ~mask
            assert not (missing & ~np.any(scene.masks[place + 1 :], 0)).any()
            assert mask.sum() >= LEAST_VISIBLE * SMALLEST**2 * 0.8
            covered += bool(missing.any())
    assert covered > 5


def test_holes_stay_open(root: Path) -> None:
    """Most zeros have background inside, which a polygon around them would take in."""
    content = read(root, "train")
    shapes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    open_centres = [
        not segmentation_mask(entry["segmentation"], *shapes[entry["image_id"]])[
            entry["bbox"][1] + entry["bbox"][3] // 2, entry["bbox"][0] + entry["bbox"][2] // 2
        ]
        for entry in content["annotations"]
        if entry["category_id"] == 1
    ]
    assert np.mean(open_centres) > 0.6


def test_val_digits_are_those_that_classifiers_have_not_seen(root: Path, tmp_path: Path) -> None:
    digits.write_digits(tmp_path / "digits")
    for split in SIZES:
        content = read(root, split)
        files = {int(path.stem): path for path in (tmp_path / "digits" / split).glob("*/*.png")}
        for entry in content["annotations"]:
            assert files[entry["scan"]].parent.name == str(entry["category_id"] - 1)


def test_same_seed_same_bytes(root: Path, tmp_path: Path) -> None:
    write_digit_scenes(tmp_path / "again", **SIZES)
    for path in root.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(root)).read_bytes()
    write_digit_scenes(tmp_path / "fewer", 3, 0)
    write_digit_scenes(tmp_path / "other", 3, 0, seed=1)
    for path in (tmp_path / "fewer" / "train").iterdir():
        assert path.read_bytes() == (root / "train" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / "train" / path.name).read_bytes()


def test_written_once_and_nothing_else_is_touched(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--train", "2", "--val", "1"]
    target = tmp_path / "scenes"
    target.mkdir()
    assert main([str(target), *arguments]) == 0
    assert "2 training and 1 test images with boxes and masks of 10" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    image = target / "val" / "000001.png"
    written = image.stat().st_mtime_ns
    assert main([str(target), *arguments]) == 0
    assert image.stat().st_mtime_ns == written
    capsys.readouterr()

    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "has the digit scenes with" in refused(str(target))
    image.unlink()
    assert "should have 1 images in val/, found 0" in refused(str(target), *arguments)
    assert "was not written by this program" in refused(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"scenes"}


def test_run_lengths_go_down_columns() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert encode_mask(mask) == {"size": [2, 3], "counts": [2, 3, 1]}
    assert encode_mask(~mask) == {"size": [2, 3], "counts": [0, 2, 3, 1]}
    assert encode_mask(np.zeros((2, 3), bool))["counts"] == [6]
    noise = np.random.RandomState(0).rand(17, 5) < 0.5
    assert (segmentation_mask(encode_mask(noise), 17, 5) == noise).all()


def test_pycocotools_reads_the_same_masks(root: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    content = read(root, "val")
    read_by_coco = coco.COCO(str(root / "annotations" / "instances_val.json"))
    for image in content["images"]:
        entries = read_by_coco.imgToAnns[image["id"]]
        for entry, mask in zip(entries, masks_of(content, image), strict=True):
            assert (read_by_coco.annToMask(entry) == mask).all()


def test_mmdetection_loads_masks_and_the_set_passes_our_checks(root: Path) -> None:
    pytest.importorskip("mmdet", reason="needs mmdetection", exc_type=ImportError)
    import kw.detection  # noqa: F401 -- mmdetection imports without a compiled mmcv
    from kw.detection.annotations import check_annotations

    for split in SIZES:
        file = root / "annotations" / f"instances_{split}.json"
        report = check_annotations(file, root / split)
        assert not report.errors, report
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    data = CocoDataset(
        ann_file=str(root / "annotations" / "instances_val.json"),
        data_prefix={"img": str(root / "val")},
        metainfo={"classes": [str(digit) for digit in range(10)]},
        test_mode=True,
    )
    content = read(root, "val")
    load = LoadAnnotations(with_mask=True)
    assert len(data) == SIZES["val"]
    for place, image in enumerate(content["images"]):
        info = data.get_data_info(place)
        info["ori_shape"] = image["height"], image["width"]
        loaded = load(info)
        expected = masks_of(content, image)
        assert not loaded["gt_ignore_flags"].any()
        assert len(loaded["gt_masks"].masks) == len(expected)
        assert all((a == b).all() for a, b in zip(loaded["gt_masks"].masks, expected, strict=True))
