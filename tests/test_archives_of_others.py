"""Archives and tables of other programs, whole or damaged, and what packing makes of them."""

from __future__ import annotations

import io
import os
import resource
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kw.config.data_schema import DataConfig
from kw.data.dataset import ImageFolder
from kw.data.listing import Listing, list_split
from kw.data.packing import Packing, check_packed, pack
from kw.data.reading import BadImageError, DataError, read_image
from kw.data.tables import _Column, _RowNames


def jpeg(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (grey, grey, grey)).save(stream, "JPEG")
    return stream.getvalue()


def to_tar(out: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(out, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out


def to_zip(out: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in members:
            archive.writestr(name, content)
    return out


def listed(root: Path, split: str = "train", **settings: Any) -> Listing:
    return list_split(DataConfig(root=str(root), **settings), split)


def greys(listing: Listing) -> list[int]:
    return [round(np.asarray(read_image(each)).mean()) for each in listing.files]


@pytest.mark.parametrize("write", [to_tar, to_zip])
def test_the_last_of_a_name_counts(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the archive is unpacked."""
    members = [("train/a/1.jpg", jpeg(1)), ("train/b/1.jpg", jpeg(2)), ("train/a/1.jpg", jpeg(9))]
    found = listed(write(tmp_path / f"set.{write.__name__[3:]}", members))
    assert (greys(found), list(found.labels)) == ([9, 2], [0, 1])
    assert "left out: 1 files whose name comes again" in capsys.readouterr().err


def test_hard_links_in_a_tar_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "set/train" / name).mkdir(parents=True)
    first = tmp_path / "set/train/a/1.jpg"
    first.write_bytes(jpeg(7))
    os.link(first, first.with_name("2.jpg"))
    os.link(first, tmp_path / "set/train/b/1.jpg")
    first.with_name("3.jpg").symlink_to("1.jpg")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "set", ".")
    found = listed(tmp_path / "set.tar")
    assert (greys(found), list(found.labels)) == ([7, 7, 7], [0, 0, 1])
    assert "left out: 1 links" in capsys.readouterr().err


def test_a_damaged_tar_file_is_refused(tmp_path: Path) -> None:
    """The standard library ends the list there."""
    members = [(f"train/{name}/{i}.jpg", jpeg(i)) for i in range(3) for name in "ab"]
    whole = to_tar(tmp_path / "set.tar", members).read_bytes()
    place = whole.index(b"train/a/1.jpg")
    damaged = bytearray(whole)
    damaged[place + 150] ^= 1  # of its header's checksum
    for content in (damaged, whole[:place], whole[: place + 100]):
        (tmp_path / "set.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"set\.tar: cut or damaged after 2 files; copy it"):
            listed(tmp_path / "set.tar")


def test_tar_files_written_one_after_another_are_refused(tmp_path: Path) -> None:
    """The standard library, and tar without -i, end with the first."""
    parts = [
        to_tar(tmp_path / f"{name}.tar", [(f"train/{name}/1.jpg", jpeg(1))]).read_bytes()
        for name in "ab"
    ]
    (tmp_path / "set.tar").write_bytes(parts[0] + bytes(2**21))
    assert greys(listed(tmp_path / "set.tar")) == [1]
    for room in (0, 2**21):
        (tmp_path / "set.tar").write_bytes(parts[0] + bytes(room) + parts[1])
        with pytest.raises(DataError, match=r"set\.tar: more follows its end after 1 files"):
            listed(tmp_path / "set.tar")


def test_a_tar_file_with_holes_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("train/a/1.bmp")
    member.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "99999"}
    member.size = 512
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(bytes(512)))
    with pytest.raises(DataError, match=r"1\.bmp has holes; .* without --sparse"):
        listed(tmp_path / "set.tar")


def test_shards_with_several_images_in_a_sample(tmp_path: Path) -> None:
    members = [
        (f"{i}.{ending}", content)
        for i in range(2)
        for ending, content in (("cls", b"%d" % i), ("depth.png", jpeg(9)), ("JPG", jpeg(50 + i)))
    ]
    to_tar(tmp_path / "train-0.tar", [("._0.cls", b"of a desktop"), *members])
    with pytest.raises(DataError, match=r"several images \(depth\.png, jpg\); .*image: \.\.\."):
        listed(tmp_path, dataset="webdataset")
    found = listed(tmp_path, dataset="webdataset", dataset_args={"image": "jpg"})
    assert (greys(found), found.labels) == ([50, 51], [0, 1])
    to_tar(tmp_path / "train-0.tar", [*members[:3], *members[:3]])
    with pytest.raises(DataError, match=r"0\.cls comes twice"):
        listed(tmp_path, dataset="webdataset")


def test_splits_have_files_of_their_own(tmp_path: Path) -> None:
    for kind, key in (("webdataset", "shards"), ("csv", "table")):
        with pytest.raises(DataError, match=rf"{key} 'all': expected \{{split\}} in it"):
            listed(tmp_path, dataset=kind, dataset_args={key: "all"})
    with pytest.raises(DataError, match=r"has no train-\{0\.\.9\}\.tar"):
        listed(tmp_path, dataset="webdataset", dataset_args={"shards": "{split}-{0..9}.tar"})
    to_zip(tmp_path / "set.zip", [("train/a/1.jpg", jpeg(1))])


def test_arguments_that_a_data_set_does_not_have(tmp_path: Path) -> None:
    to_zip(tmp_path / "set.zip", [("train/a/1.jpg", jpeg(1))])
    for args, problem in (({"validation": 0.1}, "no 'validation' among"), ("x=1", "a mapping")):
        with pytest.raises(DataError, match=rf"data\.dataset_args .* of .* zip: .*{problem}"):
            listed(tmp_path / "set.zip", dataset_args=args)


def test_a_table_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("file,label\nx.jpg,a\n,b\n")
    with pytest.raises(DataError, match=r"train\.csv:3: expected the name of a file"):
        listed(tmp_path, dataset="csv")


def test_names_of_rows_end() -> None:
    assert list(_RowNames("set", 2)) == ["set, row 0", "set, row 1"]


def test_more_shards_than_file_handles(tmp_path: Path) -> None:
    for i in range(200):
        to_tar(tmp_path / f"train-{i:03d}.tar", [("x.cls", b"%d" % (i % 2)), ("x.jpg", jpeg(i))])
    found = listed(tmp_path, dataset="webdataset")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 160, before[1]))
    try:
        assert greys(found) == list(range(200))
        assert greys(found)[::-1] == list(range(200))[::-1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_archive_that_is_gone(tmp_path: Path) -> None:
    found = listed(to_zip(tmp_path / "set.zip", [("train/a/1.jpg", jpeg(1))]))
    (tmp_path / "set.zip").unlink()
    with pytest.raises(DataError, match=r"data\.root .*set\.zip: No such file"):
        found.files[0]


def test_files_beside_a_root_that_is_a_link(tmp_path: Path) -> None:
    for place, grey in (("other", 10), ("real/other", 200)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.jpg").write_bytes(jpeg(grey))
    (tmp_path / "real/deep").mkdir()
    (tmp_path / "link").symlink_to("real/deep")
    file = tmp_path / "other/x.jpg"
    (tmp_path / "link/train.csv").write_text(f"file,label\n{file},a\n")
    found = ImageFolder(
        tmp_path / "link",
        "train",
        lambda image: torch.tensor(np.asarray(image)),
        listing=listed(tmp_path / "link", dataset="csv"),
    )
    assert found.path(0) == file
    assert found[0, 0].image.unique().tolist() == [10]


def test_a_row_without_an_image() -> None:
    with pytest.raises(BadImageError, match="cannot read image row 0: the row has no image"):
        _Column([{"image": None}], "image", ["row 0"])[0]


def packed(listing: Listing, root: Path, kind: str = "jpeg") -> Listing:
    out = root.parent / "packed.zip"
    pack({"train": listing}, root, out, Packing(kind))
    assert check_packed(out) is None
    return listed(out)


def test_packed_names(tmp_path: Path) -> None:
    """Names that are not UTF-8; a class that has the split's name."""
    root = tmp_path / "set"
    for name in ("train/train/a/1.jpg", "train/a/1.jpg", os.fsdecode(b"train/a/\xe4.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(1))
    found = packed(listed(root), root)
    inside = [name.partition(".zip/")[2] for name in found.names or []]
    assert inside == ["train/a/1.jpg", "train/a/\\xe4.jpg", "train/train/a/1.jpg"]
    assert list(found.labels) == [0, 0, 1]


def test_packed_arrays(tmp_path: Path) -> None:
    arrays = [np.full((4, 5, 3), i, dtype=np.uint8) for i in range(3)]
    found = packed(Listing(arrays, [0, 1, 0], ["a", "b"], ["x", "y", "z"]), tmp_path / "x", "keep")
    for one, other in zip(found.files, arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    wide = Listing([arrays[0].astype(np.uint16)], [0], ["a"], ["x.npy"])
    with pytest.raises(DataError, match=r"uint16 \[4, 5, 3\]: expected an array, uint8"):
        pack({"train": wide}, tmp_path, tmp_path / "wide.zip", Packing("keep"))


@pytest.mark.parametrize("kind", ["jpeg", "keep"])
def test_packing_of_images_that_cannot_be_packed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (65501, 2), (3, 3, 3)).save(stream, "PNG")
    images = {"train/a/1.jpg": jpeg(200), "train/a/2.png": stream.getvalue()}
    source = to_zip(tmp_path / "set.zip", [*images.items(), ("train/b/1.jpg", jpeg(5))])
    content = bytearray(source.read_bytes())
    content[content.index(images["train/a/1.jpg"]) + 200] ^= 1
    source.write_bytes(content)
    found = packed(listed(source), source, kind)
    assert greys(found._replace(files=[found.files[1]])) == [3]
    with pytest.raises(BadImageError, match="the file is empty"):
        read_image(found.files[0])
    shown = capsys.readouterr().err
    assert "train/a/1.jpg: its checksum is another one" in shown
    assert ("JPEG files have 65500 pixels a side at most" in shown) == (kind == "jpeg")


def test_another_program_s_part_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "train/a").mkdir(parents=True)
    (root / "train/a/1.jpg").write_bytes(jpeg(1))
    part = to_zip(tmp_path / "out.zip.part", [("of/a/download.jpg", jpeg(1))])
    content = part.read_bytes()
    with pytest.raises(DataError, match=r"out\.zip\.part is no packed set"):
        pack({"train": listed(root)}, root, tmp_path / "out.zip", Packing())
    assert part.read_bytes() == content
