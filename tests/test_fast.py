"""data.decoder fast against Pillow: the same choices, pixels within a bound, bad files, batches."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from kw.config import ConfigError, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.config.run_schema import BadImagesConfig
from kw.data.channels import Reader
from kw.data.dataset import ImageFolder, Samples
from kw.data.fast import DecodeError, Pixels, draw_box, open_fast
from kw.data.loader import build_loader, collate
from kw.data.reading import BadImageError, DataError, read_image
from kw.data.samplers import TrainBatchSampler
from kw.data.transforms import build_fast_transform, build_transform

MAX = 10**8
SIZES = [(500, 375), (331, 500), (97, 64), (40, 33), (1200, 90)]


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with some edges, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).copy()
    image[size[1] // 3 : size[1] // 2, size[0] // 4 :] //= 2
    return Image.fromarray(image).convert(mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "val"):
        for label, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for i, size in enumerate(SIZES):
                image = picture(size, "L" if i == 3 else "RGB", 10 * label + i)
                image.save(root / split / name / f"{i}.jpg", quality=92)
    picture((60, 50)).save(root / "train/a/other.png")
    return root


def open_both(folder: Path, split: str, size: int = 200, **settings: Any) -> list[ImageFolder]:
    training = split == "train"
    found = []
    data = DataConfig(root=str(folder), input_size=size, **settings)
    for fast in (None, build_fast_transform(data, training)):
        transform = build_transform(data, training)
        found.append(ImageFolder(folder, split, transform, 3, training, fast=fast))
    return found


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("size", "mean"), [(200, 0.5), (24, 3)], ids=["whole", "scaled"])
def test_the_same_images_within_a_few_levels(
    folder: Path, size: int, mean: float, split: str, interpolation: str
) -> None:
    exact, fast = open_both(folder, split, size, interpolation=interpolation)
    for epoch in range(3 if split == "train" else 1):
        for index in range(len(exact)):
            one, other = (each[epoch, index] for each in (exact, fast))
            assert (one.label, one.key) == (other.label, other.key)
            assert (other.image.dtype, other.image.shape) == (torch.uint8, (3, size, size))
            away = (one.image.int() - other.image.int()).abs()
            assert away.float().mean() < mean * (1 if interpolation != "nearest" else 2)
            if size == 200 and interpolation != "nearest":  # else another pixel is the nearest
                assert away.max() <= 6


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("shape", [[96, 160], [160, 96]])
def test_inputs_that_are_not_square(folder: Path, shape: list[int], split: str) -> None:
    data = DataConfig(root=str(folder), input_size=shape)
    training = split == "train"
    exact = ImageFolder(folder, split, build_transform(data, training), 3, training)
    fast = build_fast_transform(data, training)
    for index in range(len(exact)):
        out = torch.empty(3, *shape, dtype=torch.uint8)
        image = open_fast(exact.files[index], MAX, upright=True)
        if image is not None and fast(image, ("image", 3, 0, index), out):
            away = (exact[0, index].image.int() - out.int()).abs()
            assert away.max() <= 6
            assert away.float().mean() < 0.5


def test_mirroring_and_policies_are_drawn_alike(folder: Path) -> None:
    for settings in (
        {"horizontal_flip": 1.0},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.4},
    ):
        exact, fast = open_both(folder, "train", **settings)
        for index in range(len(exact)):
            one, other = (each[1, index].image.float() for each in (exact, fast))
            # Equalising and posterising make steps of small differences.
            assert (one - other).abs().mean() < 4


def test_it_depends_on_the_key_alone(folder: Path) -> None:
    _, fast = open_both(folder, "train")
    again = fast[2, 4].image
    assert torch.equal(fast[2, 4].image, again)
    assert not torch.equal(fast[3, 4].image, again)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("place", [0, 1], ids=["pillow", "fast"])
def test_batches_lie_in_one_memory(folder: Path, split: str, place: int) -> None:
    dataset = open_both(folder, split)[place]
    dataset.batch_shape = (3, 200, 200)
    keys = [(1, 4), (1, 0), (1, 5)]  # 5 is no JPEG file in train, and a third of 4's in val
    samples = dataset.__getitems__(keys)
    assert isinstance(samples, Samples)
    batch = collate(samples)
    assert batch["images"].data_ptr() == samples[0].image.data_ptr()
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    for image, label, key in zip(batch["images"], batch["labels"], keys, strict=True):
        alone = dataset[key]
        assert torch.equal(image, alone.image)
        assert label == alone.label


def test_bad_files_within_a_batch(folder: Path, tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "train/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"train/a/{i}.jpg").write_bytes(WHOLE if i else WHOLE[:99])
    data = DataConfig(root=str(tmp_path), input_size=32)
    parts = (build_transform(data, True), 3, True, BadImagesConfig())
    fast = build_fast_transform(data, True)
    dataset = ImageFolder(tmp_path, "train", *parts, fast=fast)
    loader = build_loader(dataset, TrainBatchSampler(4, 4, 4, seed=3), workers=0)
    (batch,) = loader
    assert [fault.path for fault in loader.faults.take()] == [str(tmp_path / "train/a/0.jpg")]
    for image, index in zip(batch["images"], batch["indices"].tolist(), strict=True):
        alone = dataset[0, index]
        assert torch.equal(image, (alone if index else alone.sample).image)


@pytest.mark.parametrize("size", [*SIZES, (16, 700), (1, 1)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1), (0.75, 1.3333)), ((0.9, 1), (1, 1))])
def test_boxes_are_timms(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    image = Image.new("L", size)
    for seed in range(50):
        random.seed(seed)
        expected = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        assert draw_box(size, scale, ratio, random.Random(seed)) == expected


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("channels", [3, 4])
def test_no_part_of_a_tiny_picture_is_empty(
    size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    """timm draws parts without a pixel: black with Pillow, an error of torch's for tensors."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    grey = Image.new("RGB" if channels == 3 else "RGBA", size, (90,) * channels)
    grey.save(tmp_path / "train/a" / ("0.jpg" if channels == 3 else "0.png"))
    data = DataConfig(root=str(tmp_path), input_size=4, channels=channels)
    transform = build_transform(data, True)
    fast = build_fast_transform(data, True)
    for with_fast in [None, fast] if channels == 3 else [None]:
        dataset = ImageFolder(
            tmp_path, "train", transform, training=True, reader=Reader.of(data), fast=with_fast
        )
        for epoch in range(40):
            assert dataset[epoch, 0].image.unique().tolist() == [90]


def test_the_crop_and_mirroring_leave_the_generators_alone(folder: Path) -> None:
    _, fast = open_both(folder, "train")
    states = random.getstate(), torch.get_rng_state()
    fast[0, 0]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif)


WHOLE = jpeg(picture((48, 40)))
OTHERS: dict[str, Callable[[], bytes]] = {
    "no JPEG": lambda: b"no image",
    "CMYK": lambda: jpeg(picture((48, 40)).convert("CMYK")),
    "turned": lambda: turned(picture((48, 40))),
    "too large": lambda: jpeg(picture((480, 400))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_pillow_has_to_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(OTHERS[kind]())
    assert open_fast(path, 100_000, upright=True) is None
    assert open_fast(tmp_path / "missing", MAX, upright=True) is None


def test_very_long_pictures_are_pillows() -> None:
    """It resizes their middle alone; eight times as long as wide is not very long."""
    fast = build_fast_transform(DataConfig(root="", input_size=24), False)
    out = torch.empty(3, 24, 24, dtype=torch.uint8)
    for size, is_taken in (((10, 80), True), ((10, 81), False), ((81, 10), False)):
        assert fast(Pixels(np.zeros((*size, 3), np.uint8)), ("image",), out) == is_taken


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_whole_pictures_are_exact(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(jpeg(picture((48, 41), mode), **options))
    found = open_fast(path, MAX, upright=True)
    assert found is not None
    assert found.size == (48, 41)
    exact = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(found.part((0, 0, 41, 48), (41, 48)), exact)
    np.testing.assert_array_equal(found.part((3, 5, 30, 20), (30, 20)), exact[3:33, 5:25])
    path.write_bytes(turned(picture((48, 40))))
    stored = open_fast(path, MAX, upright=False)
    assert stored is not None
    assert stored.size == (48, 40)


def test_large_pictures_are_decoded_smaller(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(jpeg(picture((640, 480))))
    found = open_fast(path, MAX, upright=True)
    assert found is not None
    exact = torch.from_numpy(np.asarray(Image.open(path)).copy()).movedim(-1, 0).float()
    for factor in (1, 2, 4):  # four times as much as is needed
        part = found.part((96, 64, 320, 480), (80 // factor, 120 // factor))
        assert part.shape == (320 // factor, 480 // factor, 3)
        mean = torch.nn.functional.avg_pool2d(exact[:, 96:416, 64:544], factor)
        assert (torch.from_numpy(part.copy()).movedim(-1, 0) - mean).abs().mean() < 0.7
    assert found.part((0, 0, 480, 640), (75, 100)).shape == (480, 640, 3)


@pytest.mark.parametrize("damaged", [WHOLE[: len(WHOLE) // 2], WHOLE[:-2]], ids=["cut", "no end"])
def test_damage_is_not_overlooked(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(damaged)
    found = open_fast(path, MAX, upright=True)
    assert found is not None
    with pytest.raises(DecodeError):
        found.part((0, 0, 40, 48), (40, 48))


def test_damaged_files_are_found(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a/cut.jpg").write_bytes(WHOLE[: len(WHOLE) // 2])
    _, fast = open_both(tmp_path, "val")
    with pytest.raises(BadImageError, match="truncated"):
        fast[0, 0]


def test_loaders_are_compared(
    folder: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = ("--rounds", 1, "--images", 4, "--batch-size", 4)
    tool("scripts/compare_loading.py", folder, *few)
    lines = capsys.readouterr().out.splitlines()
    own = ["pillow", "fast", "fast, packed JPEG", "fast, packed pixels"]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["timm", "torchvision", *(f"kw, {name}" for name in own)]
    tool("scripts/compare_loading.py", folder, *few, "--workers", 1, "--plot", tmp_path / "a.png")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == own
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_decoders_are_compared(
    folder: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    tool("scripts/compare_decoders.py", folder, "--rounds", 1, "--images", 2)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    away = {row[1].strip(): row[6].strip() for row in rows[2:]}
    assert away["Pillow"] == away["simplejpeg, torch"] == away["torchvision, torch"] == "0"


def test_without_the_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kw.data.dataset.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install simplejpeg"):
        open_both(folder, "val")


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": {"place": "host"}},
        {"transforms": {"to_grey": {}}},
        {"interpolation": "lanczos"},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_that_do_not_go_with_it(settings: dict[str, Any]) -> None:
    mapping = {
        "model": {"name": "resnet18"},
        "data": {"root": "unused", "decoder": "fast", **settings},
        "optimizer": {"lr": 0.1},
        "epochs": 1,
        "total_batch_size": 2,
        "batch_size": 2,
    }
    with pytest.raises(ConfigError, match=r"data\.decoder"):
        config_from_mapping(mapping, check_model_name=False)


@pytest.mark.parametrize("before", ["long", "thumbnail"])
def test_turned_behind_other_segments(before: str) -> None:
    """EXIF data of the file itself count, wherever they stand."""
    exif = Image.Exif()
    exif[0x0112] = 1
    body = b"Photoshop 3.0\0" + (exif.tobytes() if before == "thumbnail" else bytes(60_000))
    segment = b"\xff\xed" + (len(body) + 2).to_bytes(2, "big") + body
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (16, 8)).save(stream, "JPEG", exif=exif)
    content = stream.getvalue()
    place = content.index(b"\xff\xe1")
    content = content[:place] + segment * 3 + content[place:]
    assert read_image(content).size == (8, 16)
    assert open_fast(content, 10**6, True) is None
    assert open_fast(content, 10**6, False) is not None


def test_pixels_are_limited() -> None:
    pixels = np.zeros((10, 10, 3), dtype=np.uint8)
    assert open_fast(pixels, 100, True) is not None
    assert open_fast(pixels, 99, True) is None  # Pillow's path refuses them
