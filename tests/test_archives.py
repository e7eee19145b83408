"""Sets in one file and sets named by tables: the same images, labels and order as a folder's."""

from __future__ import annotations

import csv
import io
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kw.config import Config, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.config.run_schema import BadImagesConfig
from kw.data import list_splits, open_training, open_validation
from kw.data.archives import Names
from kw.data.dataset import ImageFolder
from kw.data.listing import Listing, list_split
from kw.data.packing import FORMATS, Packing, check_packed, pack
from kw.data.reading import BadImageError, DataError
from kw.data.transforms import build_fast_transform, build_transform

SIZES = [(40, 30), (24, 60), (64, 48), (17, 19)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, one with folders inside, names that sort otherwise by path; other files."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b c", "ä"):
            place = root / split / name
            (place / "in").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (*SIZES[i][::-1], 3), dtype=np.uint8)
                image = Image.fromarray(pixels)
                image.save(place / ("in" if i == 1 else "") / f"{i}.{'png' if i % 3 else 'jpg'}")
        (root / split / "a/notes.txt").write_text("no image")
        (root / split / "README").write_text("no image")
        (root / split / "a/.hidden.png").write_bytes(b"")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(root / "train/a/turned.jpg", exif=turned)
    return root


def data(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(root=str(root), input_size=32, **settings)


def samples(config: DataConfig, split: str, listing: Listing | None = None) -> list[Any]:
    training = split == "train"
    found = ImageFolder(
        config.root,
        split,
        build_transform(config, training),
        5,
        training,
        listing=listing or list_split(config, split),
        fast=build_fast_transform(config, training) if config.decoder == "fast" else None,
    )
    found = pickle.loads(pickle.dumps(found))  # as a spawned loader process gets it
    return [found[1, i] for i in range(len(found))]


def same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert (a.label, a.key) == (b.label, b.key)
        assert torch.equal(a.image, b.image)


def to_tar(folder: Path, out: Path, inside: str = ".") -> Path:
    with tarfile.open(out, "w") as archive:
        archive.add(folder, inside)  # in no order that matters
    return out


def to_zip(folder: Path, out: Path, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(out, "w", how) as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder))
    return out


def kept(folder: Path, out: Path) -> Path:
    pack(list_splits(data(folder), 3), folder, out, Packing("keep"))
    return out


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("write", [to_tar, to_zip, kept], ids=["tar", "zip", "packed"])
def test_archives_are_read_as_folders(
    write: Callable[[Path, Path], Path], split: str, decoder: str, folder: Path, tmp_path: Path
) -> None:
    out = write(folder, tmp_path / ("set.tar" if write is to_tar else "set.zip"))
    expected, found = (list_split(data(each), split) for each in (folder, out))
    assert list(found.classes) == ["a", "b c", "ä"]
    assert list(found.labels) == list(expected.labels)
    names = found.names or []
    shown = [str(path).replace(str(folder), str(out)) for path in expected.files]
    assert list(names) == shown
    same(*(samples(data(each, decoder=decoder), split) for each in (folder, out)))


def test_a_tar_file_for_each_split(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        to_tar(folder / split, tmp_path / f"{split}.tar")
        same(samples(data(tmp_path, dataset="tar"), split), samples(data(folder), split))


@pytest.mark.parametrize("names", [False, True], ids=["numbers", "names"])
def test_webdataset(names: bool, folder: Path, tmp_path: Path) -> None:
    plain = list_split(data(folder), "train")
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for i, path in list(enumerate(plain.files))[shard::2]:
                assert isinstance(path, Path)
                name = plain.classes[plain.labels[i]] if names else str(plain.labels[i])
                for ending, content in (("cls", f"{name}\n".encode()), ("jpg", path.read_bytes())):
                    member = tarfile.TarInfo(f"{i:05d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    order = [*range(0, len(plain.files), 2), *range(1, len(plain.files), 2)]
    listing = Listing(
        [plain.files[i] for i in order], [plain.labels[i] for i in order], plain.classes
    )
    config = data(tmp_path, dataset="webdataset")
    found = list_split(config, "train")
    assert list(found.classes) == (["a", "b c", "ä"] if names else ["0", "1", "2"])
    assert (found.names or [])[0] == f"{tmp_path}/train-0.tar/00000.jpg"
    same(samples(config, "train"), samples(data(folder), "train", listing))
    if not names:
        (tmp_path / "classes.txt").write_text("x\ny\nz\n")
        assert list(list_split(config, "train").classes) == ["x", "y", "z"]
    wrong = data(tmp_path, dataset="webdataset", dataset_args={"label": "json"})
    with pytest.raises(DataError, match=r"13 samples without an image or without \.json"):
        list_split(wrong, "train")
    with pytest.raises(DataError, match=r"has no val\*\.tar"):
        list_split(config, "val")


def test_csv_tables(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        plain = list_split(data(folder), split)
        with open(tmp_path / f"{split}.csv", "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["id", "file", "label"])
            for i, (path, label) in enumerate(zip(plain.files, plain.labels, strict=True)):
                table.writerow([i, path, plain.classes[label]])
        same(samples(data(tmp_path, dataset="csv"), split), samples(data(folder), split))
    config = data(tmp_path, dataset="csv")
    for encoding in ("utf-8", "utf-8-sig"):  # with a mark at its start, as editors write it
        (tmp_path / "classes.txt").write_text("ä\na\nb c\n", encoding=encoding)
        assert list(list_split(config, "val").labels) == [1, 1, 2, 2, 0, 0]
    (tmp_path / "classes.txt").write_text("ä\na\nb c\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"classes\.txt is no text in UTF-8"):
        list_split(config, "val")


def test_images_of_several_classes(folder: Path, tmp_path: Path) -> None:
    paths = list_split(data(folder), "train").files
    rows = ["file,label", f"{paths[0]},cat;dog", f"{paths[1]},", f"{paths[2]},dog"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    config = data(tmp_path, dataset="csv", dataset_args={"separator": ";"})
    found = list_split(config, "train")
    assert list(found.classes) == ["cat", "dog"]
    labels = torch.stack([each.label for each in samples(config, "train")])
    assert labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    pack({"train": found}, tmp_path, tmp_path / "set.zip", Packing("raw"))
    again = list_split(data(tmp_path / "set.zip"), "train")
    np.testing.assert_array_equal(again.labels, found.labels)


CSV_MISTAKES = {
    "no table": (None, r"train\.csv: No such file"),
    "no column": ("path,label\nx,y", r"no column 'file'.*'path,label'.*data\.dataset_args"),
    "no label": ("file,label\nx,a\ny,", r"train\.csv:3: label ''"),
    "not text": (b"file,label\n\xff,b", "no CSV file in UTF-8"),
}


@pytest.mark.parametrize("kind", CSV_MISTAKES)
def test_wrong_tables(kind: str, tmp_path: Path) -> None:
    content, message = CSV_MISTAKES[kind]
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "train.csv").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list_split(data(tmp_path, dataset="csv"), "train")


def test_a_label_that_training_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("file,label\nx,a\ny,b")
    (tmp_path / "val.csv").write_text("file,label\nx,a\ny,c")
    with pytest.raises(DataError, match=r"val\.csv:3: label 'c': expected one of 2 classes"):
        list_split(data(tmp_path, dataset="csv"), "val")


def test_one_folder_divided_by_a_seed(folder: Path) -> None:
    root = folder / "train"
    (root / "README").touch()

    def divided(seed: int, validation: float = 0.3) -> dict[str, Listing]:
        args = {"validation": validation, "split_seed": seed}
        return list_splits(data(root, dataset_args=args), 3)

    found = divided(0)
    assert [len(each.files) for each in found.values()] == [9, 4]  # of 5, 4 and 4: 2, 1 and 1
    both = {*map(str, found["train"].files), *map(str, found["val"].files)}
    assert both == {str(path) for path in list_split(data(folder), "train").files}
    assert np.bincount(found["val"].labels).tolist() == [2, 1, 1]
    assert [str(p) for p in divided(0)["val"].files] == [str(p) for p in found["val"].files]
    others = {tuple(map(str, divided(seed)["val"].files)) for seed in range(8)}
    assert len(others) > 4
    # Classes of four images each do not lose the same ones, and none loses all.
    listed = [str(path) for path in list_split(data(folder), "train").files]
    lost = [[listed.index(str(p)) for p in divided(seed)["val"].files[2:]] for seed in range(8)]
    assert len({second - first for first, second in lost}) > 1
    assert np.bincount(divided(0, 0.99)["train"].labels).tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="fraction between 0 and 1"):
        list_split(data(root, dataset_args={"validation": 2.0}), "train")


class _FakeSet:
    """What is used of ``datasets.Dataset``."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def select_columns(self, names: list[str]) -> _FakeSet:
        return _FakeSet([{n: row[n] for n in names} for row in self.rows], self.features)

    def cast_column(self, name: str, feature: Any) -> _FakeSet:
        assert not feature.decode
        return self


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of ``datasets``, where it is not installed."""
    plain = list_split(data(folder), "val")
    rows = [
        {"image": {"bytes": None if i % 2 else path.read_bytes(), "path": str(path)}, "label": k}
        for i, (path, k) in enumerate(zip(plain.files, plain.labels, strict=True))
        if isinstance(path, Path)
    ]
    features = {"image": None, "label": SimpleNamespace(names=list(plain.classes))}
    module: Any = ModuleType("datasets")
    module.Image = lambda decode: SimpleNamespace(decode=decode)
    splits = {"test": _FakeSet(rows[:1], features), "validation": _FakeSet(rows, features)}
    module.load_dataset = lambda name, **args: splits
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hugging_face(hub: None, folder: Path) -> None:
    config = data(Path("somebody/something"), dataset="huggingface")
    found = list_split(config, "val")
    assert (found.names or [])[2] == "somebody/something, val, row 2"
    same(samples(config, "val"), samples(data(folder), "val"))
    with pytest.raises(DataError, match=r"no split train; it has test, validation"):
        list_split(config, "train")
    wrong = data(Path("x/y"), dataset="huggingface", dataset_args={"label": "cls"})
    with pytest.raises(DataError, match="no column 'cls'"):
        list_split(wrong, "val")


def test_a_row_without_a_label(hub: None) -> None:
    sys.modules["datasets"].load_dataset("x/y")["validation"].rows[1]["label"] = None
    with pytest.raises(DataError, match="label None: expected a place among 3 classes"):
        list_split(data(Path("x/y"), dataset="huggingface"), "val")


def test_hugging_face_runs_no_code(hub: None) -> None:
    code = {"args": {"trust_remote_code": True}}
    for root, args in (("x/y", code), ("pandas", {"args": {"data_files": "x.pkl"}})):
        with pytest.raises(DataError, match="a configuration runs no code"):
            list_split(data(Path(root), dataset="huggingface", dataset_args=args), "val")


def test_hugging_face_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        list_split(data(Path("x/y"), dataset="huggingface"), "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_images(workers: int, folder: Path, tmp_path: Path) -> None:
    listings = list_splits(data(folder), 3)
    for kind in ("jpeg", "raw"):
        out = tmp_path / f"{kind}.zip"
        assert pack(listings, folder, out, Packing(kind, side=24), workers) == 0
        assert check_packed(out) is None
        for split, plain in listings.items():
            found = list_split(data(out), split)
            assert list(found.labels) == list(plain.labels)
            for stored, path in zip(found.files, plain.files, strict=True):
                assert isinstance(path, Path)
                with Image.open(path) as file:
                    size = file.size[::-1] if path.name == "turned.jpg" else file.size
                scale = min(24 / min(size), 1)
                expected = tuple(round(n * scale) for n in size)
                if kind == "raw":
                    assert isinstance(stored, np.ndarray)
                    shape = stored.shape[1::-1]
                else:
                    assert not isinstance(stored, Path | np.ndarray)
                    with Image.open(io.BytesIO(stored)) as file:
                        shape = file.size
                assert shape == expected
    with zipfile.ZipFile(tmp_path / "raw.zip") as archive:  # other programs read it
        pixels = np.load(io.BytesIO(archive.read("train/a/0.jpg.npy")))
    with Image.open(folder / "train/a/0.jpg") as image:
        small = np.asarray(image.convert("RGB").resize((32, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels, small)


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_pixels_are_augmented_as_files_of_their_size(
    decoder: str, folder: Path, tmp_path: Path
) -> None:
    """Small images are packed as they are; PNG files hold them exactly."""
    files = tmp_path / "files"
    for split in ("train", "val"):
        for path in (folder / split).rglob("*.png"):
            place = files / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.stat().st_size:
                shutil.copy(path, place)
    pack(list_splits(data(files), 3), files, tmp_path / "raw.zip", Packing("raw"))
    for split in ("train", "val"):
        exact = samples(data(files), split)
        found = samples(data(tmp_path / "raw.zip", decoder=decoder), split)
        if decoder == "pillow":
            same(exact, found)
        for a, b in zip(exact, found, strict=True):
            assert (a.image.int() - b.image.int()).abs().max() <= 6  # as in tests/test_fast.py


def run(settings: dict[str, Any], root: Path, **changes: Any) -> Config:
    mapping = {
        **settings,
        "batch_size": 8,
        "data": {**settings["data"], "root": str(root), **changes},
    }
    return config_from_mapping(mapping)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_packed_set(
    workers: int, settings: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set.zip"
    pack(list_splits(DataConfig(str(images)), 4), images, out, Packing("keep"))
    for rank in range(2):
        for opened in (open_training, open_validation):
            loaders = [
                opened(run(settings, root, workers=workers), torch.device("cpu"), rank, 2)
                for root in (images, out)
            ]
            for one, other in zip(*loaders, strict=True):
                assert one["key"] == other["key"]
                for key in ("images", "labels", "indices"):
                    assert torch.equal(one[key], other[key])


def test_packing_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings = list_splits(data(folder), 3)
    whole = tmp_path / "whole.zip"
    pack(listings, folder, whole, Packing())
    content = whole.read_bytes()
    out, part = tmp_path / "set.zip", tmp_path / "set.zip.part"
    encoded: list[str] = []
    save = Image.Image.save

    def counted(image: Image.Image, *args: Any, **options: Any) -> None:
        encoded.append("one")
        save(image, *args, **options)

    monkeypatch.setattr(Image.Image, "save", counted)
    for cut in (0, 10, 200, len(content) // 2, len(content) - 40, len(content)):
        encoded.clear()
        part.write_bytes(content[:cut])
        pack(listings, folder, out, Packing())
        assert out.read_bytes() == content
        assert not part.exists()
        if cut > len(content) // 3:
            assert len(encoded) < 13
        out.unlink()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="begun with another set or other settings"):
        pack(listings, folder, out, Packing(quality=80))
    with pytest.raises(DataError, match="begun with another set"):
        pack({"train": listings["train"]}, folder, out, Packing())
    with pytest.raises(DataError, match="exists"):
        pack(listings, folder, whole, Packing())


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_files_stay_bad(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        path = tmp_path / f"set/train/a/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    path.write_bytes(b"no image")
    (tmp_path / "set/train/a/3.png").write_bytes(b"")
    listings = {"train": list_split(data(tmp_path / "set"), "train")}
    bad = pack(listings, tmp_path / "set", tmp_path / "set.zip", Packing(kind))
    assert bad == (0 if kind == "keep" else 2)
    config = data(tmp_path / "set.zip")
    found = ImageFolder(
        config.root,
        "train",
        build_transform(config, True),
        training=True,
        bad_images=BadImagesConfig(),
        listing=list_split(config, "train"),
    )
    faults = found[0, 2].faults
    assert (faults[0].image, faults[0].reason) == (2, "no image of a known format")
    assert faults[0].path == f"{tmp_path}/set.zip/train/a/2.png"
    assert found[0, 3].faults[0].reason == "the file is empty"


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    out = kept(folder, tmp_path / "set.zip")
    content = bytearray(out.read_bytes())
    place = content.index((folder / "train/a/0.jpg").read_bytes())
    content[place + 300] ^= 1
    out.write_bytes(content)
    listing = list_split(data(out), "train")
    with pytest.raises(BadImageError, match=r"train/a/0\.jpg: its checksum is another one"):
        listing.files[0]
    assert check_packed(out) == "train/a/0.jpg"
    index = content.rindex(b"train/text.npy")
    content[index + 100] ^= 1
    out.write_bytes(content)
    with pytest.raises(DataError, match="its index is damaged"):
        list_split(data(out), "train")
    out.write_bytes(content[:-300])
    with pytest.raises(DataError, match="ends too early: a packed set that was cut"):
        list_split(data(out), "train")


def test_archives_that_are_refused(folder: Path, tmp_path: Path) -> None:
    packed = kept(folder, tmp_path / "packed.zip")
    with pytest.raises(DataError, match=r"has no test; it has train, val"):
        list_split(data(packed), "test")
    deflated = to_zip(folder, tmp_path / "small.zip", zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"is compressed or encrypted; .* kw pack"):
        list_split(data(deflated), "train")
    (tmp_path / "none.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match="whole and not compressed"):
        list_split(data(tmp_path / "none.tar"), "train")
    with pytest.raises(DataError, match="expected images as train/CLASS/NAME, found none"):
        list_split(data(to_tar(folder / "val", tmp_path / "val.tar")), "train")
    with pytest.raises(DataError, match="No such file"):
        list_split(data(tmp_path / "missing.zip", dataset="zip"), "train")


@pytest.mark.parametrize("write", [to_tar, to_zip], ids=["tar", "zip"])
def test_classes_without_images(write: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    """Refused as in a folder: the labels of the classes behind would be other ones."""
    for name in ("a", "b", "c"):
        (tmp_path / "set/train" / name).mkdir(parents=True)
        if name != "b":
            Image.new("RGB", (9, 9)).save(tmp_path / f"set/train/{name}/0.png")
    out = write(tmp_path / "set", tmp_path / ("set.tar" if write is to_tar else "set.zip"))
    with pytest.raises(DataError, match="1 of 3 class folders in train/ have no image: b"):
        list_split(data(out), "train")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    for name in ("a.png", "a.png.jpg"):
        (tmp_path / "train/x").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "train/x" / name)
    listings = {"train": list_split(data(tmp_path), "train")}
    with pytest.raises(DataError, match=r"two images would have the name train/x/a\.png\.jpg"):
        pack(listings, tmp_path, tmp_path / "set.zip", Packing())


def test_names_without_an_encoding() -> None:
    names = ["ä", "\udcff", "", "plain"]
    found = Names.of(names, "p/")
    assert [found[i] for i in range(len(found))] == [f"p/{name}" for name in names]


def test_the_command(
    folder: Path, tmp_path: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set.zip"
    tool("kw pack", folder, out, "--side", 20, "--workers", 0)
    assert "13 train, 6 val images" in capsys.readouterr().out
    tool("kw pack", "--check", out)
    assert "all checksums are right" in capsys.readouterr().out
    raw = tmp_path / "again.zip"
    tool("kw pack", out, raw, "--dataset", "zip", "--format", "raw", "--workers", 0)
    assert list(list_split(data(raw), "val").labels) == [0, 0, 1, 1, 2, 2]
    more = tmp_path / "more.zip"
    tool("kw pack", folder / "train", more, "--dataset-args", "{validation: 3e-1}", "--workers", 0)
    assert "9 train, 4 val images" in capsys.readouterr().out
    for wrong, said in (
        ("{validation: x}", "expected its argument 'validation' to be float"),
        ("{validation: [", "not valid"),
        ("validation", "expected a mapping"),
    ):
        with pytest.raises(SystemExit) as end:
            tool("kw pack", folder / "train", tmp_path / "none.zip", "--dataset-args", wrong)
        assert end.value.code == 2
        assert said in capsys.readouterr().err
