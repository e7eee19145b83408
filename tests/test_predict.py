"""``tools/predict.py``: files and folders, a batch at a time, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deployment import CLASSES, SETTINGS, write_checkpoint
from PIL import Image

import kw
from kw.deploy import find_images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pth", SETTINGS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in folders, among them a hidden one; two files that are none."""
    root = tmp_path / "photos"
    names = ("b.png", "a.jpg", "deep/er/c.JPG", "deep/d.webp", ".hidden.png", ".thumbs/e.png")
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50 + level, 44), (40 * level, 90, 200 - 30 * level)).save(root / name)
    (root / "broken.jpg").write_bytes((root / "a.jpg").read_bytes()[:300])
    (root / "empty.png").touch()
    (root / "notes.txt").write_text("no image")
    return root


def test_folders_are_walked_in_order(photos: Path) -> None:
    names = [path.relative_to(photos).as_posix() for path in find_images([photos])]
    assert names == ["a.jpg", "b.png", "broken.jpg", "deep/d.webp", "deep/er/c.JPG", "empty.png"]
    text, inside = photos / "notes.txt", photos / "deep"
    assert find_images([text, inside])[0] == text  # what is named is taken as it is
    assert len(find_images([text, inside])) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_table_and_json(
    model: Path, photos: Path, tool: Any, capsys: Any, tmp_path: Path, batch_size: int
) -> None:
    found = tmp_path / "found.json"
    options = ["--top", 2, "--json", found, "--batch-size", batch_size]
    tool("tools/predict.py", model, photos, *options)
    captured = capsys.readouterr()
    content = json.loads(found.read_text())
    readable = [photos / name for name in ("a.jpg", "b.png", "deep/d.webp", "deep/er/c.JPG")]
    assert [image["file"] for image in content["images"]] == list(map(str, readable))
    expected = kw.load(model).predict(readable, k=2)
    for image, row in zip(content["images"], expected, strict=True):
        assert [p["name"] for p in image["predictions"]] == [p.name for p in row]
        shares = [p["probability"] for p in image["predictions"]]
        assert shares == pytest.approx([p.probability for p in row], abs=1e-5)
    assert [Path(f["file"]).name for f in content["unreadable"]] == ["broken.jpg", "empty.png"]
    assert captured.err.count("cannot read") == 2
    assert "empty.png: the file is empty" in captured.err
    lines = captured.out.splitlines()
    assert len(lines) == 2 + 4 * 2  # a header, two lines an image
    assert f"{100 * expected[0][0].probability:.2f}" in lines[2]
    assert all(any(name in line for name in CLASSES) for line in lines[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}/notes.txt", "{photos}/empty.png"], "none of 2 file(s) could be read"),
        (["{photos}/gone.png"], "gone.png: no such file or folder"),
        (["{photos}", "--top", "0"], "expected an integer >= 1"),
        (["{photos}", "--device", "tpu"], "expected cpu, cuda or cuda:N"),
    ],
)
def test_mistakes(
    model: Path, photos: Path, tool: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as status:
        tool("tools/predict.py", model, *(a.format(photos=photos) for a in arguments))
    assert status.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert message in err


def test_a_folder_without_images(model: Path, tmp_path: Path, tool: Any, capsys: Any) -> None:
    (tmp_path / "void").mkdir()
    with pytest.raises(SystemExit):
        tool("tools/predict.py", model, tmp_path / "void")
    assert "holds no image" in capsys.readouterr().err
