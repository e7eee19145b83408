"""scripts/prepare_coco.sh on tiny archives of the official ones' structure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_coco.sh"
COUNTS = {"COCO_TRAIN_IMAGES": "4", "COCO_VAL_IMAGES": "2", "COCO_CATEGORIES": "3"}
IMAGES = {"train2017": [9, 25, 30, 34], "val2017": [139, 285]}


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHON": sys.executable} | COUNTS | environment,
    )


def content(split: str) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in IMAGES[split]],
        "annotations": [{"id": 1 + i, "image_id": IMAGES[split][i % 2]} for i in range(5)],
        "categories": [{"id": i, "name": f"name {i}"} for i in (1, 5, 90)],
    }


def write_images(folder: Path, split: str, images: list[int]) -> None:
    with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
        archive.writestr(f"{split}/", "")
        for i in images:
            archive.writestr(f"{split}/{i:012d}.jpg", f"image {i}" * 20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for split, images in IMAGES.items():
        write_images(folder, split, images)
    name = folder / "annotations_trainval2017.zip"
    with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in IMAGES:
            archive.writestr(f"annotations/instances_{split}.json", json.dumps(content(split)))
            archive.writestr(f"annotations/captions_{split}.json", "{}")
    return folder


@pytest.fixture
def prepared(source: Path, tmp_path: Path) -> Path:
    target = tmp_path / "co.co .v1"
    result = run(source, target)
    assert result.returncode == 0, result.stderr
    return target


def assert_refused(result: subprocess.CompletedProcess[str], *parts: object) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    for part in parts:
        assert str(part) in result.stderr
    assert "Traceback" not in result.stderr


def test_everything_lands_in_its_place(prepared: Path, source: Path) -> None:
    files = sorted(str(path.relative_to(prepared)) for path in prepared.rglob("*.*"))
    assert files == [
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        *(f"{split}/{i:012d}.jpg" for split, images in IMAGES.items() for i in images),
    ]
    assert (prepared / "val2017" / "000000000139.jpg").read_text() == "image 139" * 20
    result = run("--check", f"{prepared}/")
    assert result.returncode == 0
    assert "train2017: 4 images, 5 objects of 3 categories" in result.stdout
    assert "val2017: 2 images, 5 objects of 3 categories" in result.stdout
    shutil.rmtree(source)
    source.mkdir()
    assert run(source, prepared).returncode == 0  # nothing is needed of the archives any more


def test_an_interrupted_run_is_continued(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    archive = source / "train2017.zip"
    whole = archive.read_bytes()
    # A member that was damaged, after others that were not.
    archive.write_bytes(whole.replace(b"image 34image 34", b"image 34imaGe 34", 1))
    assert_refused(run(source, target), "cannot unpack", archive, "CRC", "complete?")
    partial = target / ".train2017.partial"
    assert not (target / "train2017").exists()
    assert (target / "val2017").exists()
    assert len(list(partial.glob("*.jpg"))) == 3
    first = (partial / "000000000009.jpg").stat()

    (partial / "000000000025.jpg").write_bytes(b"cut")
    archive.write_bytes(whole[:-30])
    assert_refused(run(source, target), "cannot unpack", archive, "complete?")
    write_images(source, "train2017", IMAGES["train2017"][:3])
    assert_refused(run(source, target), "has 3 images, expected 4", archive)
    assert not (target / "train2017").exists()

    archive.write_bytes(whole)
    result = run(source, target)
    assert result.returncode == 0, result.stderr
    again = (target / "train2017" / "000000000009.jpg").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert (target / "train2017" / "000000000025.jpg").read_text() == "image 25" * 20
    assert not list(target.rglob("*partial*"))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(target: Path) -> None:
        file = target / "annotations" / "instances_train2017.json"
        read = json.loads(file.read_text())
        change(read)
        file.write_text(json.dumps(read))

    return apply


def of_train(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda target: change(target / "train2017" / name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (of_train("", shutil.rmtree), "no folder"),
        (of_train("000000000025.jpg", os.remove), "lacks 1 images that"),
        (of_train("000000000025.jpg", lambda path: path.write_bytes(b"")), "1 empty images: 0000"),
        (lambda target: shutil.rmtree(target / "annotations"), "no file"),
        (edit(lambda read: read["images"].pop()), "has 3 images, expected 4"),
        (edit(lambda read: read["categories"].pop()), "has 2 categories, expected 3"),
        (edit(lambda read: read["images"][0].update(id=25)), "names image ids twice: 25"),
        (edit(lambda read: read["annotations"][0].update(id=2)), "names annotation ids twice: 2"),
        (edit(lambda read: read["annotations"][0].update(image_id=1)), "does not list: 1"),
        (edit(lambda read: read.pop("images")), "is not an annotation file, or not whole"),
    ],
)
def test_check_says_what_is_wrong(
    prepared: Path, fault: Callable[[Path], object], message: str
) -> None:
    fault(prepared)
    assert_refused(run("--check", prepared), "prepare_coco.sh: ", message, prepared)


def test_expected_counts(prepared: Path, tmp_path: Path) -> None:
    result = run("--check", prepared, COCO_VAL_IMAGES="5000")
    assert_refused(result, "has 2 images, expected 5000")
    assert_refused(run("--check", tmp_path / "no"), "no folder", tmp_path / "no" / "train2017")


def test_sources_that_cannot_do(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert_refused(run(tmp_path / "no", target), "SOURCE_DIR", tmp_path / "no")
    assert_refused(run(source, target, PYTHON="/no/python"), "/no/python is not Python 3.8")
    with zipfile.ZipFile(source / "val2017.zip", "w") as archive:
        archive.writestr("images/1.jpg", "")
    assert_refused(run(source, target), "has no images in val2017/")
    (source / "train2017.zip").rename(source / "train.zip")
    assert_refused(run(source, target), "lacks train2017.zip; it has:", "train.zip")


def test_too_little_disk_space(source: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    df = commands / "df"
    df.write_text("#!/bin/sh\necho head\necho disk 100 100 0 100% /\n")
    df.chmod(0o755)
    with zipfile.ZipFile(source / "val2017.zip", "a") as archive:
        archive.writestr("val2017/large.jpg", bytes(5000))
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    assert_refused(run(source, tmp_path / "target", PATH=path), "MB free, unpacking takes")
    assert not (tmp_path / "target" / "annotations").exists()


def test_usage() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "COCO_TRAIN_IMAGES=4" in result.stdout
    assert_refused(run("--chek", "x"), "unknown option --chek")
    assert_refused(run("x"), "expected SOURCE_DIR and TARGET_DIR")
    assert_refused(run("--check"), "--check takes TARGET_DIR")
