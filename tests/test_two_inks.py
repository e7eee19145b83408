"""The demo's images: the same every time, balanced, and from different scans on either side."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from kw.data.digits import choose_val, load_scans
from kw.data.reading import DataError
from kw.data.two_inks import choose_scans, main, see, write_two_inks

SIZES = {"train": 160, "val": 80}


def _written(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/*/*.png")}


def test_images_are_balanced_and_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--train", "160", "--val", "80"]
    assert main([str(tmp_path / "a"), *arguments]) == 0
    assert "160 training and 80 held-out images of 10 classes in 2 lights" in (
        capsys.readouterr().out
    )
    files = _written(tmp_path / "a")
    write_two_inks(tmp_path / "b", 170, 80)
    more = _written(tmp_path / "b")
    assert files == {name: more[name] for name in files}  # however many there are
    assert files.values() != _written_with_seed(tmp_path / "c", 1).values()

    cells: Counter[tuple[str, str, str]] = Counter()
    for name in files:
        found = re.fullmatch(r"(\w+)/(\d)/\d+_(warm|cool)(_scan\d{4}){2}\.png", name)
        assert found is not None
        cells[found[1], found[2], found[3]] += 1
    for split, size in SIZES.items():
        counts = [count for (where, *_), count in cells.items() if where == split]
        assert counts == [size // 20] * 20
    with Image.open(next((tmp_path / "a").glob("train/*/*.png"))) as image:
        assert image.size == (16, 16)
        assert image.mode == "RGB"

    assert main([str(tmp_path / "a"), *arguments, "--size", "4"]) == 2
    assert "a size from 8" in capsys.readouterr().err
    with pytest.raises(DataError, match="has the two inks with"):
        write_two_inks(tmp_path / "a", 160, 90)


def _written_with_seed(root: Path, seed: int) -> dict[str, bytes]:
    write_two_inks(root, **SIZES, seed=seed)
    return _written(root)


@pytest.mark.parametrize("search", [False, True])
def test_splits_share_no_scan(tmp_path: Path, search: bool) -> None:
    write_two_inks(tmp_path / "d", **SIZES, search=search)
    _, labels = load_scans()
    pools, test = choose_scans(labels, search), set(choose_scans(labels)["val"])
    seen: dict[str, set[int]] = {"train": set(), "val": set()}
    for path in (tmp_path / "d").glob("*/*/*.png"):
        scan, other = int(path.stem[-13:-9]), int(path.stem[-4:])
        assert labels[scan] == int(path.parent.name) != labels[other]
        seen[path.parts[-3]] |= {scan, other}
    assert seen["train"] <= set(pools["train"])
    assert seen["val"] <= set(pools["val"])
    assert not set(pools["train"]) & set(pools["val"])
    assert not test & set(pools["train"])
    if search:  # what settings are chosen on is neither trained nor tested on
        assert not test & set(pools["val"])
    else:  # nor do the detection demo's canvases show what was trained on here
        assert choose_val(labels) <= test


def test_the_light_tells_which_ink_counts() -> None:
    full, empty = np.full((8, 8), 255, np.uint8), np.zeros((8, 8), np.uint8)
    for warm in (True, False):
        for scan, other, sign in ((full, empty, 1), (empty, full, -1)):
            image = see(scan, other, warm, 32, np.random.RandomState(0)).astype(float)
            ink = image[12:20, 12:20].mean() - image[0].mean()
            assert ink * sign * (1 if warm else -1) > 20
            red, blue = image[..., 0].mean(), image[..., 2].mean()
            assert (red > blue) == warm
