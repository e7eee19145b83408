"""Prediction with a detector: the loader's own results, files by identity, COCO's formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_set import detector_text, write_coco_set
from coco_sets import random_set, reference
from PIL import Image

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import kw
from kw import detection
from kw.data import DataError
from kw.detection import load_detector_config, train
from kw.detection.annotations import check_annotations
from kw.detection.data import build_eval_loader
from kw.detection.pictures import picture_names, write_pictures
from kw.detection.sets import result_ids
from kw.errors import UserError
from kw.objects.found import Found, coco_file, coco_results
from kw.objects.run_lengths import encode_masks
from kw.training import CheckpointError, load_checkpoint
from kw.training.trained import trained_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set, and the work directory of a short run on it."""
    root = tmp_path_factory.mktemp("predict")
    coco = write_coco_set(root / "set")
    (root / "detector.py").write_text(detector_text(coco))
    train(load_detector_config(root / "detector.py"), root / "run")
    return coco, root / "run"


def call(tool: Callable[..., None], *arguments: Any, status: int = 0) -> None:
    if status == 0:
        tool("tools/predict.py", *arguments)
        return
    with pytest.raises(SystemExit) as stop:
        tool("tools/predict.py", *arguments)
    assert stop.value.code == status


def test_a_run_on_the_hub(run: Any, hub: Any, tool: Callable[..., None], tmp_path: Path) -> None:
    """What builds it goes there, nothing of the machine; it comes back where the user allows it."""
    coco, work_dir = run
    text = (work_dir / "config.py").read_text()
    mine = {"weights": str(tmp_path / "w.pth"), "type": "kw.Backbone"}
    head = "init_cfg=dict(type='Pretrained', checkpoint='mine/fpn.pth'), "
    text = text.replace("type='kw.Backbone'", ", ".join(f"{k}={v!r}" for k, v in mine.items()))
    text = text.replace("neck=dict(", f"neck=dict({head}").replace("load_from = None", "")
    text = text.replace("loggers = dict()", "loggers = dict(tensorboard=dict(log_dir='/mine'))")
    shutil.copytree(work_dir, tmp_path / "run")
    (tmp_path / "run/config.py").write_text(f"{text}# mine\nload_from = '../mine/start.pth'\n")
    tool("kw push", tmp_path / "run", "me/detector")
    files = hub.repositories["me/detector"].files("main")
    own = {"README.md", "config.json", "config.py", "model.safetensors", "results.json"}
    assert set(files) == own
    assert b"pipeline_tag: object-detection" in files["README.md"]
    assert b"kw pull me/detector FOLDER --allow-code" in files["README.md"]
    published = files["config.py"].decode()
    assert not [
        word for word in (str(coco.parent), "mine", "'..", "Pretrained") if word in published
    ]
    assert f"root='{coco.name}'" in published
    tool("kw pull", "me/detector", tmp_path / "copy", "--allow-code")
    picture = next((coco / "val").glob("*.png"))
    (found, classes), (expected, _) = (
        (each.predict(picture), each.classes)
        for each in (kw.load(tmp_path / "copy"), detection.load(work_dir))
    )
    again = load_checkpoint(tmp_path / "copy" / "model.safetensors")["meta"]
    assert again["epoch"] == load_checkpoint(trained_file(work_dir))["meta"]["epoch"]
    # A file of weights is data: the program beside it is not run for it, nor looked for.
    for other in ("model.safetensors", ""):
        with pytest.raises(UserError, match=r"is of a detector.*kw pull --allow-code"):
            kw.load(tmp_path / "copy" / other)
        (tmp_path / "copy" / "config.py").unlink(missing_ok=True)
    assert classes == ["red", "green", "blue"]
    assert len(expected.scores) > 0
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_one_by_one_is_as_evaluated(run: Any) -> None:
    coco, work_dir = run
    predictor = detection.load(work_dir)
    assert predictor.classes == ["red", "green", "blue"]
    predictor.config.run.eval_batch_size = 1  # attention pools over what a batch is padded with
    loader: Any = build_eval_loader(predictor.config, predictor.classes, 0, 1)
    seen = 0
    for batch in loader:
        for sample in predictor.detector.val_step(batch):
            file = coco / "val" / f"val_{sample.img_id - 100}.png"
            found = predictor.predict(file)
            theirs = sample.pred_instances
            order = theirs.scores.argsort(descending=True, stable=True)
            assert torch.equal(found.scores, theirs.scores[order])
            assert torch.equal(found.boxes, theirs.bboxes[order])
            assert found.masks is not None
            assert len(found.masks) == len(found.boxes)
            seen += len(found.boxes)
            with Image.open(file) as image:
                for same in (image, np.asarray(image)):
                    assert torch.equal(predictor.predict(same).boxes, found.boxes)
                assert predictor.draw(image, found).size >= image.size == found.size
            best = predictor.predict(file, float(found.scores[0])) if len(found.scores) else found
            assert len(best.scores) <= 1 or best.scores[0] == best.scores[-1]
    assert seen > 0


def test_a_folder_and_cocos_formats(
    run: Any, tmp_path: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    coco, work_dir = run
    content = json.loads((coco / "annotations" / "instances_val.json").read_text())
    info = tmp_path / "image_info.json"
    info.write_text(json.dumps({k: v for k, v in content.items() if k != "annotations"}))
    results = tmp_path / "results.json"
    call(
        tool, work_dir, coco / "val", "--annotations", info, "--json", results,
        "--pictures", tmp_path / "pictures",
    )  # fmt: skip
    # Of all scores: https://github.com/facebookresearch/detr/issues/319 had 60 mAP for 89.
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == set(ids.values())
    assert {row["category_id"] for row in rows} <= {2, 4, 7}
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"val_{i}.png" for i in range(5)]

    capsys.readouterr()
    listed = tmp_path / "found.json"
    one = coco / "val" / ".." / "train" / "train_0.png"
    call(tool, work_dir / "best.pth", coco / "val", one, "--json", listed, "--score", "0.001")
    assert "objects, score 0.001 and above" in capsys.readouterr().out
    found = json.loads(listed.read_text())
    # Names are below the folder that holds all that was given.
    assert [each["file_name"] for each in found["images"]] == [
        *(f"val/{name}" for name in names),
        "train/train_0.png",
    ]
    assert len(found["annotations"]) >= 20
    assert [each["name"] for each in found["categories"]] == ["red", "green", "blue"]
    report = check_annotations(listed, coco)
    # Masks of a detector that has learnt nothing may be empty or lie anywhere in their box.
    kinds = {each.kind for each in report.errors} - {"box-mask-apart"}
    assert not kinds


def test_cocos_tools_read_the_results() -> None:
    """pycocotools makes of them the figures of the detections themselves."""
    truth, detections = random_set(np.random.default_rng(0), images=6, crowded=20)
    found = [
        (
            image_id,
            Found(
                torch.as_tensor(each["boxes"]),
                torch.as_tensor(each["scores"]),
                torch.as_tensor(each["labels"]),
                each["masks"],
                (1, 1),
            ),
        )
        for image_id, each in detections.items()
    ]
    names = [each["name"] for each in sorted(truth["categories"], key=lambda each: each["id"])]
    results = json.loads(json.dumps(coco_results(found, result_ids(names, truth, "file"))))
    expected = reference(truth, detections)
    annotated = COCO()
    annotated.dataset = truth
    annotated.createIndex()
    for kind in ("bbox", "segm"):
        evaluator = COCOeval(annotated, annotated.loadRes(results), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        assert evaluator.stats[0] == pytest.approx(expected[f"{kind}_mAP"], abs=1e-3)
        assert evaluator.stats[0] > 0.05


def test_files_that_cannot_be_read_and_wrong_arguments(
    run: Any, tmp_path: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    coco, work_dir = run
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    call(tool, work_dir, tmp_path / "photos", status=2)
    assert "none of 1 file(s) could be read" in capsys.readouterr().err
    call(tool, work_dir, tmp_path / "photos", coco / "val" / "val_0.png")
    assert f"cannot read {tmp_path / 'photos' / 'bad.png'}: no image" in capsys.readouterr().err
    call(tool, work_dir, coco / "val", "--top", "3", status=2)
    assert "--top: " in capsys.readouterr().err
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"images": [], "categories": []}))
    call(tool, work_dir, coco / "val" / "val_0.png", "--annotations", names, status=2)
    assert "expected one folder as IMAGES" in capsys.readouterr().err
    names.write_text(
        json.dumps({"images": [{"id": 1, "file_name": "val_0.png"}], "categories": []})
    )
    call(tool, work_dir, coco / "val", "--annotations", names, "--json", tmp_path / "r", status=2)
    told = capsys.readouterr()
    assert f"{names} has no category red, green, blue" in told.err
    assert "objects, score" not in told.out  # before the first image is looked at
    for images, message in (
        (
            [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}],
            "a whole number that no other",
        ),
        ([{"id": "1", "file_name": "val_0.png"}], "a whole number that no other has"),
        ([{"id": 1, "file_name": ""}], "needs a file_name and an id"),
    ):
        names.write_text(json.dumps({"images": images, "categories": []}))
        call(tool, work_dir, coco / "val", "--annotations", names, status=2)
        assert message in capsys.readouterr().err
    call(tool, tmp_path / "none", coco / "val", "--score", "0.3", status=2)
    assert "none: no such file or folder" in capsys.readouterr().err
    alone = tmp_path / "alone.pth"
    alone.write_bytes((work_dir / "best.pth").read_bytes())
    call(tool, alone, coco / "val", status=2)
    assert "is a detector's, which needs the config.py of its run" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="expected a detector's work directory"):
        detection.load(tmp_path)


def test_pictures_beside_the_truth(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture is of its own image, though one cannot be read and all have one stem."""
    _, work_dir = run
    coco = write_coco_set(tmp_path / "set")
    file = coco / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for place, image in enumerate(content["images"]):
        folder = coco / "val" / f"cam{place}"
        folder.mkdir()
        (coco / "val" / image["file_name"]).rename(folder / "1.png")
        image["file_name"] = f"cam{place}/1.png"
        with Image.open(folder / "1.png") as opened:
            exif = Image.Exif()
            exif[0x0112] = 6
            opened.transpose(Image.Transpose.ROTATE_90).save(folder / "1.png", exif=exif)
    file.write_text(json.dumps(content))
    bad = coco / "val" / "cam1" / "1.png"
    bad.write_bytes(bad.read_bytes()[:100])
    caplog.set_level("INFO", "kw")
    config = load_detector_config(work_dir / "config.py", [f"data.root={coco}"])
    written = write_pictures(config, work_dir / "best.pth", tmp_path / "out", images=3, score=1)
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        "cam0/1.png", "cam2/1.png", "cam3/1.png", "sheet.png",
    ]  # fmt: skip
    assert f"cannot read image {bad}" in caplog.text
    for place, path in zip((0, 2, 3), written, strict=False):
        with Image.open(path) as picture, Image.open(coco / "val" / f"cam{place}" / "1.png") as own:
            upright = own.transpose(Image.Transpose.ROTATE_270).convert("RGB")
            scale = -(-480 // max(upright.size))
            large = upright.resize((upright.width * scale, upright.height * scale), 0)
            drawn = np.asarray(picture)[-large.height :, : large.width]
            assert (drawn == np.asarray(large)).mean() > 0.99
    # A mask that cannot be drawn costs a picture, or nothing where masks are not looked for.
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5]]
    file.write_text(json.dumps(content))
    unchecked = load_detector_config(
        work_dir / "config.py", [f"data.root={coco}", "data.check=false"]
    )
    for masks, first in ((True, "cam2"), (False, "cam0")):
        monkeypatch.setattr("kw.detection.predictor.has_masks", lambda _, found=masks: found)
        given = config if not masks else unchecked
        written = write_pictures(given, work_dir / "best.pth", tmp_path / "out", images=1)
        assert written[0] == tmp_path / "out" / first / "1.png"
    assert "its annotations do not fit it (ValueError: cannot reshape" in caplog.text
    for each in content["images"]:
        (coco / "val" / each["file_name"]).write_bytes(b"no image")
    with pytest.raises(DataError, match="none of its images can be read"):
        write_pictures(config, work_dir / "best.pth", tmp_path / "out")


def test_drafts_are_annotation_files(tmp_path: Path) -> None:
    """What a detector finds is read back: boxes, masks and their areas."""
    mask = np.zeros((1, 40, 50), bool)
    mask[0, 5:15, 10:30] = True
    mask[0, 5:10, 10:20] = False
    found = Found(
        torch.tensor([[10.0, 5.0, 30.0, 15.0]]),
        torch.tensor([0.75]),
        torch.tensor([1]),
        encode_masks(mask),
        (50, 40),
    )
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    content = json.loads(json.dumps(coco_file([("a.png", found)], ["cat", "dog"])))
    (row,) = content["annotations"]
    assert (row["area"], row["category_id"], row["score"]) == (150, 2, 0.75)
    (tmp_path / "draft.json").write_text(json.dumps(content))
    report = check_annotations(tmp_path / "draft.json", tmp_path)
    assert [each.kind for each in report.findings] == ["category-unused"]
    boxes = coco_file([("a.png", found._replace(masks=None))], ["cat", "dog"])
    assert boxes["annotations"][0]["area"] == 200
    assert "segmentation" not in boxes["annotations"][0]


def test_ids_of_results() -> None:
    names = [("parts", 0), ("nut", 1), ("bolt", 2)]
    content: dict[str, Any] = {"categories": [{"id": i, "name": name} for name, i in names]}
    assert result_ids(["bolt", "nut"], content, "file") == [2, 1]
    content["categories"][0]["name"] = "bolt"
    with pytest.raises(DataError, match="file has several categories bolt"):
        result_ids(["bolt", "nut"], {**content, "annotations": None}, "file")
    content["annotations"] = [{"category_id": 2}]
    assert result_ids(["bolt", "nut"], content, "file") == [2, 1]


def test_images_are_not_drawn_over(
    run: Any, tmp_path: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    coco, work_dir = run
    photos = tmp_path / "photos"
    shutil.copytree(coco / "val", photos / "a")
    before = (photos / "a" / "val_0.png").read_bytes()
    for out in (photos / "a", photos / "a" / "drawn"):
        call(tool, work_dir, photos / "a", "--pictures", out, status=2)
        assert f"{out} lies in {photos / 'a'}, which holds" in capsys.readouterr().err
    call(tool, work_dir, photos / "a" / "val_0.png", "--pictures", photos / "a", status=2)
    assert "val_0.png is one of the images" in capsys.readouterr().err
    assert (photos / "a" / "val_0.png").read_bytes() == before
    # Around two folders pictures would come into both.
    cameras = [tmp_path / "cameras" / name for name in "ab"]
    for camera in cameras:
        camera.mkdir(parents=True)
        (camera / "1.jpg").write_bytes(before)
    call(tool, work_dir, *cameras, "--pictures", tmp_path / "cameras", status=2)
    assert f"{cameras[0] / '1.png'} lies in {cameras[0]}, which holds" in capsys.readouterr().err
    config = load_detector_config(work_dir / "config.py")
    with pytest.raises(DataError, match="which holds the images"):
        write_pictures(config, work_dir / "best.pth", coco / "val")
    # One image that the transforms fail on is listed, the others are done.
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    found = tmp_path / "found.json"
    files = (photos / "a" / "val_0.png", tmp_path / "thin.png")
    call(tool, work_dir, *files, "--json", found)
    assert "thin.png: test_pipeline fails on it" in capsys.readouterr().err
    assert len(json.loads(found.read_text())["images"]) == 1


def test_names_of_pictures() -> None:
    files = ["a/1.jpg", "a/1.png", "b/1.jpg", "../c.jpg", "/d/e.tif", "A/1.gif", "sheet.jpg"]
    names = picture_names(files)
    assert names == [
        "a/1.jpg.png", "a/1.png.png", "b/1.png", "c.png", "d/e.png", "A/1.gif.png", "sheet.jpg.png",
    ]  # fmt: skip
    for files in (["1.jpg"] * 3, ["../1.jpg", "1.jpg"], ["1.jpg", "1.png", "1.jpg.png", ".."]):
        names = picture_names(files)
        assert len(set(names)) == len(files)
        assert all(name.endswith(".png") for name in names)
