"""COCO's figures: those of pycocotools, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("pycocotools")
pytest.importorskip("faster_coco_eval")

from breadth import breadth
from coco_sets import Detections, random_set, reference, write
from pycocotools import mask as mask_api

from kw.data import DataError
from kw.detection.evaluation import FIGURES, CocoEvaluator
from kw.objects.run_lengths import decompress, encode_masks


def add_all(evaluator: CocoEvaluator, found: Detections, share: slice = slice(None)) -> None:
    for image_id in list(found)[share]:
        evaluator.add(image_id, **found[image_id])


def assert_same(figures: dict[str, float | None], expected: dict[str, float]) -> None:
    assert list(figures) == list(expected)
    for name, value in expected.items():
        # Means of the same numbers in another order differ in the last digits.
        assert figures[name] == (None if value == -1 else pytest.approx(value, abs=1e-12)), name


@pytest.mark.parametrize("seed", breadth(range(8), range(3)))
def test_figures_are_those_of_pycocotools(tmp_path: Path, seed: int) -> None:
    truth, found = random_set(np.random.default_rng(seed))
    expected = reference(truth, found)
    assert 0.05 < expected["bbox_mAP"] < 0.95
    assert 0.05 < expected["segm_mAP"] < 0.95
    assert any(annotation["iscrowd"] for annotation in truth["annotations"])
    file = write(truth, tmp_path / "truth.json")
    evaluator = CocoEvaluator(file, masks=True)
    add_all(evaluator, found)
    figures = evaluator.compute()
    assert_same(figures, expected)
    json.dumps(figures, allow_nan=False)


def test_evaluating_again_gives_the_same(tmp_path: Path) -> None:
    truth, found = random_set(np.random.default_rng(20))
    evaluator = CocoEvaluator(write(truth, tmp_path / "truth.json"), masks=True)
    add_all(evaluator, found)
    first = evaluator.compute()
    add_all(evaluator, dict(reversed(found.items())))
    assert evaluator.compute() == first


def test_labels_follow_the_classes_that_are_given(tmp_path: Path) -> None:
    truth, found = random_set(np.random.default_rng(21))
    classes = ["class 3", "class 0", "class 4"]
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    kept = truth | {
        "categories": [c for c in truth["categories"] if c["name"] in classes],
        "annotations": [
            a for a in truth["annotations"] if a["category_id"] in {ids[name] for name in classes}
        ],
    }
    for each in found.values():
        each["labels"] %= 3
    by_id = sorted(classes, key=lambda name: ids[name])
    place = np.array([by_id.index(name) for name in classes])
    expected = reference(kept, {k: v | {"labels": place[v["labels"]]} for k, v in found.items()})
    evaluator = CocoEvaluator(write(truth, tmp_path / "truth.json"), classes, masks=True)
    add_all(evaluator, found)
    assert_same(evaluator.compute(), expected)


def test_tensors_and_pixels_do_as_arrays_and_run_lengths(tmp_path: Path) -> None:
    truth, found = random_set(np.random.default_rng(22), images=6, detections=8, crowded=12)
    file = write(truth, tmp_path / "truth.json")
    evaluator = CocoEvaluator(file, masks=True)
    add_all(evaluator, found)
    expected = evaluator.compute()
    for image in truth["images"]:
        each = found[image["id"]]
        runs, size = each["masks"], (image["height"], image["width"])
        pixels = np.zeros((0, *size), bool)
        if runs:
            pixels = mask_api.decode(runs).transpose(2, 0, 1).astype(bool)
            assert encode_masks(pixels) == runs
            assert encode_masks(torch.from_numpy(pixels)) == runs
            counts = decompress(runs[0]["counts"].decode())
            assert counts is not None
            runs_of = np.repeat(np.arange(len(counts)) % 2, counts)
            assert (runs_of == pixels[0].T.ravel()).all()
        tensors = {key: torch.from_numpy(each[key]) for key in ("boxes", "scores", "labels")}
        evaluator.add(image["id"], **tensors, masks=torch.from_numpy(pixels))
    assert evaluator.compute() == expected


def test_what_does_not_exist_is_none(tmp_path: Path) -> None:
    truth, found = random_set(np.random.default_rng(23), images=6)
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] < 32**2]
    evaluator = CocoEvaluator(write(truth, tmp_path / "small.json"))
    add_all(evaluator, found)
    figures = evaluator.compute()
    assert figures["bbox_mAP_l"] is figures["bbox_AR_l"] is figures["bbox_mAP_m"] is None
    assert figures["bbox_mAP_s"] == pytest.approx(figures["bbox_mAP"], abs=0.5)
    assert list(figures) == [f"bbox_{name}" for name in FIGURES]

    truth["annotations"] = []
    evaluator = CocoEvaluator(write(truth, tmp_path / "none.json"), masks=True)
    add_all(evaluator, found)
    assert set(evaluator.compute().values()) == {None}


def test_nothing_found_counts_as_zero(tmp_path: Path) -> None:
    truth, found = random_set(np.random.default_rng(24), images=6)
    evaluator = CocoEvaluator(write(truth, tmp_path / "truth.json"), masks=True)
    none: dict[str, Any] = {"boxes": [], "scores": [], "labels": [], "masks": []}
    for image_id in list(found)[:2]:  # the others are not added at all
        evaluator.add(image_id, **none)
    assert set(evaluator.compute().values()) == {0.0}


def test_an_object_of_id_zero_is_found(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 0, "file_name": "a.png", "width": 50, "height": 50}],
        "categories": [{"id": 0, "name": "thing"}],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 0, "bbox": [5, 5, 20, 20], "area": 400}
        ],
    }
    evaluator = CocoEvaluator(write(truth, tmp_path / "truth.json"))
    evaluator.add(0, [[5, 5, 25, 25]], [0.9], [0])
    assert evaluator.compute()["bbox_mAP"] == pytest.approx(1, abs=1e-12)


def work(rank: int, store: str, file: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    _, found = random_set(np.random.default_rng(30))
    evaluator = CocoEvaluator(file, masks=True)
    results: list[Any] = []
    for twice in (False, True):
        # Of different length, and the second takes the images in another order.
        add_all(evaluator, found, slice(0, 15) if rank == 0 else slice(None, 14, -1))
        if twice and rank == 1:
            evaluator.add(next(iter(found)), [], [], [], [])
        try:
            results.append(evaluator.compute())
        except ValueError as error:
            results.append(str(error))
    (out / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    truth, found = random_set(np.random.default_rng(30))
    file = write(truth, tmp_path / "truth.json")
    mp.start_processes(
        work, (str(tmp_path / "store"), str(file), tmp_path), nprocs=2, start_method="fork"
    )
    evaluator = CocoEvaluator(file, masks=True)
    add_all(evaluator, found)
    figures = evaluator.compute()
    for rank in range(2):
        shared, twice = json.loads((tmp_path / f"{rank}.json").read_text())
        assert shared == figures
        # Every process raises: one that waited for figures would wait for ever.
        assert twice == f"evaluated on two processes: image {next(iter(found))}"


BOX = {"boxes": [[1.0, 1.0, 5.0, 5.0]], "scores": [0.5], "labels": [0]}
MASK = {"size": [3, 3], "counts": b"9"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "image 7, which .* does not have"),
        ({"image_id": "again"}, "was evaluated twice"),
        ({"labels": [6]}, "labels from 6 to 6, but there are 6 classes"),
        ({"labels": [-1]}, "labels from -1"),
        ({"scores": [float("nan")]}, "not finite"),
        ({"boxes": [[0, 0, float("inf"), 1]]}, "not finite"),
        ({"scores": [0.5, 0.4]}, "differ in number: 1, 2, 1, 1"),
        ({"masks": None}, "differ in number"),
        ({"masks": [MASK]}, r"a mask of \(3, 3\), but the image has"),
        ({"masks": np.ones((3, 3), bool)}, r"must be \[N, H, W\]"),
    ],
)
def test_wrong_detections_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    truth, _ = random_set(np.random.default_rng(25), images=4)
    evaluator = CocoEvaluator(write(truth, tmp_path / "truth.json"), masks=True)
    image = truth["images"][0]
    pixels = np.ones((1, image["height"], image["width"]), bool)
    arguments = {"image_id": image["id"], **BOX, "masks": pixels, **change}
    if change.get("image_id") == "again":
        arguments["image_id"] = image["id"]
        evaluator.add(**arguments)
    with pytest.raises(ValueError, match=message):
        evaluator.add(**arguments)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    truth, _ = random_set(np.random.default_rng(26), images=4)
    file = write(truth, tmp_path / "truth.json")
    with pytest.raises(DataError, match="no category class 9; it has class 0, class 1"):
        CocoEvaluator(file, ["class 0", "class 9"])
    evaluator = CocoEvaluator(file)
    with pytest.raises(ValueError, match="no image was added"):
        evaluator.compute()
    with pytest.raises(DataError, match=r"nowhere\.json: No such file"):
        CocoEvaluator(tmp_path / "nowhere.json")
    for key, masks, message in (
        ("area", False, "lacks 'area'"),
        ("segmentation", True, "lacks 'segmentation'"),
    ):
        broken = json.loads(json.dumps(truth))
        del broken["annotations"][0][key]
        with pytest.raises(DataError, match=message):
            CocoEvaluator(write(broken, tmp_path / "broken.json"), masks=masks)
    broken = truth | {"images": truth["images"] * 2}
    with pytest.raises(DataError, match="image id twice"):
        CocoEvaluator(write(broken, tmp_path / "broken.json"))


def test_masks_are_compressed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = np.random.default_rng(0).random((7, 20, 30)) < 0.3
    whole = encode_masks(masks)
    for pixels in (1, 1300):
        monkeypatch.setattr("kw.objects.run_lengths._PIXELS", pixels)
        assert encode_masks(masks) == whole


@pytest.mark.parametrize("first", [-5, 0, 2**53 - 3, 2**63 - 40])
def test_any_ids(tmp_path: Path, first: int) -> None:
    """Evaluators confuse ids that no float64 holds, and take some for none."""
    truth, found = random_set(np.random.default_rng(3), images=8)
    evaluator = CocoEvaluator(write(truth, tmp_path / "truth.json"), masks=True)
    add_all(evaluator, found)
    expected = evaluator.compute()
    places = {each["id"]: i for i, each in enumerate(sorted(truth["images"], key=_id))}
    for each in truth["images"]:
        each["id"] = first + places[each["id"]]
    for each in truth["annotations"]:
        each["image_id"] = first + places[each["image_id"]]
    evaluator = CocoEvaluator(write(truth, tmp_path / "other.json"), masks=True)
    add_all(evaluator, {first + places[image_id]: each for image_id, each in found.items()})
    assert evaluator.compute() == expected


def _id(row: dict[str, Any]) -> int:
    return int(row["id"])


def test_run_lengths_of_another_size_are_refused(tmp_path: Path) -> None:
    truth, _ = random_set(np.random.default_rng(3), images=8)
    crowd = next(each for each in truth["annotations"] if each["iscrowd"])
    crowd["segmentation"]["size"].reverse()
    with pytest.raises(DataError, match=r"has run lengths of \[\d+, \d+\] \(height, width\)"):
        CocoEvaluator(write(truth, tmp_path / "truth.json"), masks=True)
