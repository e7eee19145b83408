"""Which files of a folder are images; what is left out is counted and said."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_engine import changed, run
from torchvision.datasets.folder import make_dataset

from kw.config.data_schema import DataConfig
from kw.data import DataError, ImageFolder, list_splits
from kw.data.walk import IMAGE_EXTENSIONS, describe, walk_images
from kw.deploy.predict import find_images


def check_data_root(
    root: Path, num_classes: int, splits: Sequence[str] = ("train", "val")
) -> Sequence[str]:
    return list_splits(DataConfig(root=str(root)), num_classes, splits)[splits[0]].classes


def picture(path: Path, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (100, 50, 25)).save(path, kind)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.full((3, 2, 2), image.getpixel((0, 0))[0], dtype=torch.uint8)


def names_of(folder: Path) -> tuple[list[str], Counter[str]]:
    left_out: Counter[str] = Counter()
    return [str(p.relative_to(folder)) for p in walk_images(folder, left_out)], left_out


def test_what_is_hidden_or_no_image_is_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "sub/c.jfif", "sub/deep/d.gif", "e.avif"):
        picture(tmp_path / name)
    for name in (".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "sub/__MACOSX/._c.jpg"):
        picture(tmp_path / name)
    for name in ("notes.txt", "more.TXT", "sub/model.pth", ".DS_Store", "README", "._a.png"):
        (tmp_path / name).write_text("")
    found, left_out = names_of(tmp_path)
    assert sorted(found) == ["a.png", "b.JPG", "e.avif", "sub/c.jfif", "sub/deep/d.gif"]
    assert left_out == {
        "hidden folders": 3,
        "hidden files": 2,
        "*.txt": 2,
        "*.pth": 1,
        "files without an ending": 1,
    }
    assert describe(left_out).startswith("3 hidden folders, 2 ")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "other" / "b.png")
    (tmp_path / "set" / "here").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "above").symlink_to(tmp_path)
    (tmp_path / "set" / "beside").symlink_to(tmp_path / "other")
    found, left_out = names_of(tmp_path / "set")
    assert found == ["a.png", "beside/b.png"]
    assert left_out == {"links back": 2}


def test_links_that_lead_to_one_another(tmp_path: Path) -> None:
    """Each folder has a link to the other: every image is found once."""
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "other" / "b.png")
    (tmp_path / "set" / "there").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "set")
    assert names_of(tmp_path / "set") == (["a.png", "there/b.png"], {"links back": 1})


def test_a_link_to_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies beside the images, not around them."""
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "here" / "b.png")
    (tmp_path / "set" / "there").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert find_images([Path("../set")]) == [Path("../set/a.png"), Path("../set/there/b.png")]


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images would be missing, on this process alone perhaps."""
    for name in ("x/a.png", "x/sub/b.png", "y/c.png"):
        picture(tmp_path / "train" / name)
    scan = os.scandir

    def fails(path: Any) -> Any:
        if Path(path).name == "sub":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fails)
    for listed in (
        lambda: check_data_root(tmp_path, 2, ["train"]),
        lambda: find_images([tmp_path]),
    ):
        with pytest.raises(OSError, match=r"Input/output error: .*train/x/sub"):
            listed()


@pytest.mark.parametrize("ending", IMAGE_EXTENSIONS)
def test_every_ending_is_read_by_content(tmp_path: Path, ending: str) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "x" / f"a{ending}")
    assert check_data_root(tmp_path, 1, ["val"]) == ["x"]
    assert ImageFolder(tmp_path, "val", to_tensor)[0, 0].image[0, 0, 0] == 100


def test_the_order_is_torchvisions(tmp_path: Path) -> None:
    """Labels and draws of runs that were made before stay what they were."""
    names = (
        "a.png",
        "b/c.png",
        "a/z.png",
        "a-b/q.png",
        "B.png",
        "a/b/c.png",
        "a.b/x.png",
        "10.png",
    )
    for label in ("x", "y"):
        for name in names:
            picture(tmp_path / "val" / label / name)
    ours = ImageFolder(tmp_path, "val", to_tensor)
    theirs = make_dataset(str(tmp_path / "val"), {"x": 0, "y": 1}, extensions=(".png",))
    assert [(str(ours.path(i)), label) for i, label in enumerate(ours.labels)] == theirs


def test_a_folder_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kw")
    picture(tmp_path / "val" / "x" / "a.png")
    ImageFolder(tmp_path, "val", to_tensor)
    assert not caplog.text
    picture(tmp_path / "val" / "x" / ".ipynb_checkpoints" / "a.png")
    picture(tmp_path / "val" / ".trash" / "a.png")
    (tmp_path / "val" / "labels.csv").write_text("")
    assert len(ImageFolder(tmp_path, "val", to_tensor)) == 1
    assert f"{tmp_path / 'val'}: left out: 2 hidden folders, 1 files beside" in caplog.text
    caplog.clear()
    assert find_images([tmp_path]) == [tmp_path / "val" / "x" / "a.png"]
    assert "2 hidden folders, 1 *.csv" in caplog.text


def test_a_class_of_hidden_images_is_empty(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "x" / "a.png")
    picture(tmp_path / "train" / "y" / ".cache" / "a.png")
    with pytest.raises(DataError, match=r"1 of 2 class folders in .* have no image: y"):
        check_data_root(tmp_path, 2, ["train"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8_end_no_run(
    settings: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    """Of a class and of files, readable ones and one that is not."""
    root = tmp_path / "data"
    strange = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        for folder in (images / split).iterdir():
            name = strange if folder.name == "fish" else folder.name
            for file in folder.iterdir():
                target = root / split / name / (os.fsdecode(b"\xff") + file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        (root / split / strange / os.fsdecode(b"broken\xfe.png")).write_bytes(b"no image")
    settings = changed(settings, data__root=str(root), data__bad_images={"policy": "skip"})
    metrics = run(changed(settings, epochs=1), tmp_path / "run")
    assert metrics["images"] == 20
    assert (
        strange.encode("utf-8", "surrogateescape") in (tmp_path / "run/bad_images.txt").read_bytes()
    )
    assert run(changed(settings, epochs=2), tmp_path / "run", resume=True)["images"] == 20
