"""scripts/prepare_imagenet.sh on tiny archives of the official ones' structure."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

sio = pytest.importorskip("scipy.io")
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("tar") is None, reason="needs bash and tar"
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_imagenet.sh"
TRAIN = {"n00000011": 3, "n00000022": 4, "n00000033": 5}
# Deliberately not in sorted order: the devkit numbers its classes otherwise than by wnid.
IDS = {1: "n00000033", 2: "n00000011", 3: "n00000022"}
VAL_IDS = [3, 1, 2, 1, 2, 3]
COUNTS = {
    "IMAGENET_CLASSES": "3",
    "IMAGENET_TRAIN_IMAGES": "12",
    "IMAGENET_TRAIN_PER_CLASS": "3-5",
    "IMAGENET_VAL_IMAGES": "6",
    "IMAGENET_VAL_PER_CLASS": "2-2",
}


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHON": sys.executable} | COUNTS | environment,
    )


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def class_archives() -> dict[str, bytes]:
    return {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": f"{wnid} {i}".encode() for i in range(count)})
        for wnid, count in TRAIN.items()
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(class_archives()))
    val = {
        f"ILSVRC2012_val_{number:08d}.JPEG": IDS[label].encode()
        for number, label in enumerate(VAL_IDS, start=1)
    }
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))

    # A fourth synset with children stands for the hierarchy's inner nodes, which are no classes.
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    synsets = np.array(
        [(number, wnid, f"name {number}", "gloss", 0) for number, wnid in IDS.items()]
        + [(4, "n00000044", "inner", "gloss", 3)],
        dtype=[(name, object) for name in fields],
    )
    matlab = io.BytesIO()
    sio.savemat(matlab, {"synsets": synsets})
    devkit = {
        "meta.mat": matlab.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in VAL_IDS).encode(),
    }
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(
        tar_of({f"ILSVRC2012_devkit_t12/data/{n}": c for n, c in devkit.items()}, "w:gz")
    )
    return folder


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


@pytest.fixture(scope="module")
def prepared(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("prepared") / "im.agenet .v1"
    result = run(pristine, target)
    assert result.returncode == 0, result.stderr
    return target


def assert_refused(result: subprocess.CompletedProcess[str], *parts: object) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    for part in parts:
        assert str(part) in result.stderr


def test_every_image_lands_in_its_class(prepared: Path) -> None:
    assert sorted(path.name for path in prepared.iterdir()) == ["train", "val"]
    for wnid, count in TRAIN.items():
        images = sorted((prepared / "train" / wnid).iterdir())
        assert [path.read_text() for path in images] == [f"{wnid} {i}" for i in range(count)]
        val = list((prepared / "val" / wnid).iterdir())
        assert len(val) == 2
        assert {path.read_text() for path in val} == {wnid}
    result = run("--check", prepared)
    assert result.returncode == 0
    assert "3 classes, 12 images" in result.stdout
    assert "3 classes, 6 images" in result.stdout


@pytest.mark.slow
def test_an_interrupted_run_is_continued(source: Path, tmp_path: Path) -> None:
    archive = source / "ILSVRC2012_img_train.tar"
    members = class_archives()
    target = tmp_path / "target"
    # Cut within an image, and between two images, which tar itself does not mind.
    for end, message in ((600, "cannot extract n00000033.tar"), (1024, "has 1 images, expected")):
        cut = {"n00000033.tar": members["n00000033.tar"][:end]}
        archive.write_bytes(tar_of(members | cut))
        assert_refused(run(source, target), message, archive)
    assert not (target / "train" / "n00000033").exists()
    assert not (target / "val").exists()
    first = target / "train" / "n00000011" / "n00000011_0.JPEG"
    written = first.stat().st_mtime_ns, first.stat().st_ino

    (target / "train" / ".n00000033.partial").mkdir(exist_ok=True)
    (target / "train" / ".n00000033.partial" / "stray.JPEG").touch()
    archive.write_bytes(tar_of(members))
    result = run(source, target)
    assert result.returncode == 0, result.stderr
    assert "1 of 3 classes to extract" in result.stdout
    assert written == (first.stat().st_mtime_ns, first.stat().st_ino)
    assert len(list((target / "train" / "n00000033").iterdir())) == 5

    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"not read again")
    assert run(source, target).returncode == 0


def test_check_says_what_is_wrong(prepared: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(prepared, tmp_path / "target"))
    assert_refused(run("--check", tmp_path / "no"), "no folder", tmp_path / "no" / "train")
    assert_refused(run("--check", target, IMAGENET_CLASSES="1000"), "3 classes", "expected 1000")
    assert_refused(run("--check", target, IMAGENET_TRAIN_IMAGES="13"), "12 images", "expected 13")
    next((target / "val" / "n00000022").iterdir()).unlink()
    assert_refused(run("--check", target), target / "val", "n00000022 (1)")
    shutil.rmtree(target / "val")
    assert_refused(run("--check", target), "no folder", target / "val")
    shutil.copytree(target / "train", target / "val")
    (target / "val" / "n00000022").rename(target / "val" / "n00000055")
    same = {"IMAGENET_VAL_IMAGES": "12", "IMAGENET_VAL_PER_CLASS": "3-5"}
    assert_refused(run("--check", target, **same), "only one of", "n00000022 n00000055")


def test_sources_that_cannot_do(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert_refused(run(tmp_path / "no", target), "SOURCE_DIR", tmp_path / "no")
    assert_refused(run(source, target, PYTHON="/no/python"), "/no/python has not both")
    assert_refused(
        run(source, target, IMAGENET_CLASSES="5"), "3 class archives", "expected 5", source
    )
    assert_refused(run("--md5", source, target), "is not the published one", "1d675b47d978889d")
    (source / "ILSVRC2012_img_val.tar").rename(source / "val.tar")
    assert_refused(run(source, target), "lacks ILSVRC2012_img_val.tar", "it has:", "val.tar")
    assert not (target / "train").exists()


@pytest.mark.slow
def test_val_images_that_the_devkit_lists_must_be_there(source: Path, tmp_path: Path) -> None:
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": b""}))
    assert_refused(run(source, tmp_path / "target"), "lacks images", "n00000011")
    assert not (tmp_path / "target" / "val").exists()


def test_too_little_disk_space(source: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    df = commands / "df"
    df.write_text("#!/bin/sh\necho head\necho disk 100 90 10 90% /\n")
    df.chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    result = run(source, tmp_path / "target", PATH=path)
    assert_refused(result, tmp_path / "target", "free", "extracting takes")
    assert not (tmp_path / "target" / "train").exists()


def test_usage() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "IMAGENET_CLASSES" in result.stdout
    assert_refused(run("--chek", "x"), "unknown option --chek")
    assert_refused(run("x"), "expected SOURCE_DIR and TARGET_DIR")
    assert_refused(run("--check"), "--check takes TARGET_DIR")
