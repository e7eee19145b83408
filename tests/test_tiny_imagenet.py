"""kw.data.tiny_imagenet on archives of the original's structure, with a class or two too few."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kw.data import tiny_imagenet

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes of four, three training and two validation images."""
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 2)
    monkeypatch.setattr(tiny_imagenet, "_TRAIN_PER_CLASS", 3)
    monkeypatch.setattr(tiny_imagenet, "_VAL_PER_CLASS", 2)


def original() -> Files:
    """As Stanford's archive: four classes, five images each, labels of val/ in a table."""
    files: Files = {}
    for wnid in ("n04", "n02", "n03", "n01"):
        for i in (10, 0, 2, 1, 20):
            files[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG"] = f"{wnid} {i}".encode()
        files[f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt"] = b""
    table = ""
    for i in range(8):
        wnid = f"n0{i % 4 + 1}"
        files[f"tiny-imagenet-200/val/images/val_{i}.JPEG"] = f"val {i} {wnid}".encode()
        table += f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n"
    files["tiny-imagenet-200/val/val_annotations.txt"] = table.encode()
    files["tiny-imagenet-200/test/images/test_0.JPEG"] = b"test"
    return files


# Every second class; names sort as text: 0, 1, 10, 2, 20.
EXPECTED = {
    **{f"train/{w}/{w}_{i}.JPEG": f"{w} {i}" for w in ("n01", "n03") for i in (0, 1, 10)},
    "val/n01/val_0.JPEG": "val 0 n01",
    "val/n01/val_4.JPEG": "val 4 n01",
    "val/n03/val_2.JPEG": "val 2 n03",
    "val/n03/val_6.JPEG": "val 6 n03",
}


def zipped(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def subset() -> Files:
    return {f"tiny-imagenet-100/{name}": text.encode() for name, text in EXPECTED.items()}


@pytest.mark.parametrize(("write", "files"), [(zipped, original()), (tarred, subset())])
def test_both_archives_give_the_subset(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path, Files], Path],
    files: Files,
) -> None:
    archive, root = write(tmp_path / "archive", files), tmp_path / "data"
    for _ in range(2):  # the second time finds it done
        assert tiny_imagenet.main([str(archive), str(root)]) == 0
        said = "tiny-imagenet-100: 6 training and 4 validation images of 2 classes in"
        assert said in capsys.readouterr().out
    found = {str(p.relative_to(root)): p.read_text() for p in root.glob("*/*/*")}
    assert found == EXPECTED


def test_training_images_are_held_out(tmp_path: Path) -> None:
    """The last ones of every class validate, and the validation images are left out."""
    archive, root = zipped(tmp_path / "a.zip", original()), tmp_path / "held_out"
    for _ in range(2):  # the second time it is there already
        assert tiny_imagenet.prepare(archive, root, 1) == {"train": 4, "val": 2}
    found = {str(p.relative_to(root)): p.read_bytes().decode() for p in root.rglob("*.JPEG")}
    train = {name: text for name, text in EXPECTED.items() if name.startswith("train")}
    last = {name: text for name, text in train.items() if name.endswith("_10.JPEG")}
    expected = {k: v for k, v in train.items() if k not in last}
    assert found == expected | {k.replace("train", "val"): v for k, v in last.items()}
    with pytest.raises(tiny_imagenet.DataError, match="--hold-out 3: expected 0 to 2"):
        tiny_imagenet.prepare(archive, tmp_path / "none", 3)
    with pytest.raises(tiny_imagenet.DataError):
        tiny_imagenet.prepare(archive, root, 0)  # it holds another split


def test_names_of_an_archive_lead_nowhere_else(tmp_path: Path) -> None:
    files = {
        **subset(),
        "x/train/../../../stray.JPEG": b"",
        "x/train/n01/../../../../stray.JPEG": b"",
        "/train/n99/../stray.JPEG": b"",
    }
    archive = tarred(tmp_path / "archive", files)
    assert tiny_imagenet.main([str(archive), str(tmp_path / "a/b/data")]) == 2
    assert not list(tmp_path.rglob("stray.JPEG"))
    assert not (tmp_path / "a/b/data").exists()


def without(files: Files, name: str) -> Files:
    return {key: value for key, value in files.items() if name not in key}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (without(original(), "n03_1.JPEG"), None),  # there is another image to take
        (without(original(), "val_6"), "val/ has 2 classes, expected 2; .*: n03 (1);"),
        (without(subset(), "n03"), "train/ has 1 classes, expected 2"),
        ({"readme": b""}, "train/ has 0 classes, expected 2"),
        (subset() | {"t/train/n01/n01_0.JPEG": b"0" * (2**20 + 1)}, "has 1,048,577 bytes"),
    ],
)
def test_other_archives_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: Files, said: str | None
) -> None:
    archive, root = zipped(tmp_path / "archive", files), tmp_path / "data"
    assert tiny_imagenet.main([str(archive), str(root)]) == (0 if said is None else 2)
    if said is not None:
        error = capsys.readouterr().err
        assert said.split(" .*")[0] in error
        assert said.split(".*")[-1] in error
        assert not root.exists()


def test_what_is_no_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("not an archive")
    for name, said in (("text", "cannot be read as an archive"), ("none", "no such file")):
        assert tiny_imagenet.main([str(tmp_path / name), str(tmp_path / "data")]) == 2
        assert said in capsys.readouterr().err
