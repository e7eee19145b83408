"""Images of other channels than RGB, and of 16 bits: files, tensors, first layers of networks."""

from __future__ import annotations

import io
import logging
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kw.config import ConfigError, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.config.run_schema import BadImagesConfig
from kw.data.batch_augment import BatchAugment
from kw.data.channels import Reader
from kw.data.dataset import UNREADABLE, ImageFolder
from kw.data.faults import BadImage, FaultLog
from kw.data.loader import build_loader
from kw.data.preprocess import BatchPreprocessor
from kw.data.reading import BadImageError, read_image
from kw.data.samplers import EvalBatchSampler
from kw.data.seeding import seeded
from kw.data.transforms import build_transform
from kw.models import build_model
from kw.models.build import start_network
from kw.models.weights import CheckpointError
from kw.pictures.style import to_pixels

SMALL = {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]}


def data_of(channels: int, **settings: Any) -> DataConfig:
    ones = {"mean": [0.4] * channels, "std": [0.2] * channels, "input_size": 32}
    return DataConfig(root="unused", channels=channels, **{**ones, **settings})


def noise(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def exact(array: np.ndarray) -> torch.Tensor:
    """``[H, W, C]`` as the tensor of ``pixels: uint16``."""
    white = np.iinfo(array.dtype).max
    return torch.from_numpy((array * (255 / white)).astype(np.float32)).permute(2, 0, 1)


# Files


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", ["interleaved", "planar", "pages", "deflated tiles"])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_tiff(channels: int, layout: str, order: Any, tmp_path: Path) -> None:
    """8 and 16 bits, to the bit; as bytes, 16 bits are rounded to the nearest."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "image.tif"
    kinds: dict[str, dict[str, Any]] = {
        "interleaved": {"planarconfig": "contig"},
        "planar": {"planarconfig": "separate"},
        "pages": {},
        "deflated tiles": {"planarconfig": "contig", "tile": (16, 16), "compression": "zlib"},
    }
    for dtype in (np.uint8, np.uint16):
        array = noise(19, 23, channels, dtype=dtype)
        turned = layout in ("planar", "pages") and channels > 1
        written = array.transpose(2, 0, 1) if turned else array
        options = {"photometric": "minisblack", "byteorder": order, **kinds[layout]}
        if channels == 1:
            options.pop("planarconfig", None)
            written = array[..., 0]
        tifffile.imwrite(path, written, **options)
        torch.testing.assert_close(
            Reader(channels, "uint16")(path), exact(array), rtol=1e-6, atol=0
        )
        back = Reader(channels, "uint16")(path).double() * (np.iinfo(dtype).max / 255)
        assert torch.equal(back.round(), exact_levels(array))
        if channels > 1:
            expected = (array / (np.iinfo(dtype).max / 255)).round().astype(np.uint8)
            found = Reader(channels)(path)
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))


def exact_levels(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_as_pillow_turns(orientation: int, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array, path = noise(5, 8, 3), tmp_path / "image.tif"
    tifffile.imwrite(path, array, extratags=[(274, "H", 1, orientation, True)])
    expected = exact(np.asarray(read_image(path)))
    assert torch.equal(Reader(3, "uint16")(path), expected)
    stored = Reader(3, "uint16", upright=False)(path)
    assert torch.equal(stored, exact(array))


def test_files_in_memory(tmp_path: Path) -> None:
    """As members of archives are read; messages have their names."""
    tifffile = pytest.importorskip("tifffile")
    array, path = noise(5, 8, 4), tmp_path / "image.tif"
    tifffile.imwrite(path, array, planarconfig="contig")
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(Reader(4)(path.read_bytes()), expected)
    assert torch.equal(Reader(4)(memoryview(path.read_bytes())), expected)
    Image.fromarray(array).save(tmp_path / "image.png")
    assert torch.equal(Reader(4)((tmp_path / "image.png").read_bytes()), expected)
    for content in (b"", b"no image", path.read_bytes()[:40]):
        with pytest.raises(BadImageError, match=r"a\.zip: b\.tif"):
            Reader(4)(content, "a.zip: b.tif")


def test_white_is_zero_where_the_file_says_so(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array, path = noise(5, 8, 1, dtype=np.uint16), tmp_path / "image.tif"
    tifffile.imwrite(path, 65535 - array[..., 0], photometric="miniswhite")
    torch.testing.assert_close(Reader(1, "uint16")(path), exact(array), rtol=1e-6, atol=0)


def png_of_16_bits(array: np.ndarray) -> bytes:
    """RGB ``[H, W, 3]``, which Pillow cannot write."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_other_formats_keep_their_channels(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    rgba, deep = noise(6, 9, 4), noise(6, 9, dtype=np.uint16)
    Image.fromarray(rgba).save(path)
    assert torch.equal(Reader(4)(path), torch.from_numpy(rgba).permute(2, 0, 1))
    assert torch.equal(Reader(4)(rgba), torch.from_numpy(rgba).permute(2, 0, 1))
    assert torch.equal(Reader(4)(Image.open(path)), torch.from_numpy(rgba).permute(2, 0, 1))
    Image.fromarray(rgba[..., :2].copy(), "LA").save(path)
    assert torch.equal(Reader(2)(path), torch.from_numpy(rgba[..., :2]).permute(2, 0, 1))
    grey, alpha = rgba[..., :1], rgba[..., 1:2]
    spread = np.concatenate([grey, grey, grey, alpha], 2)
    assert torch.equal(Reader(4)(path), torch.from_numpy(spread).permute(2, 0, 1))
    Image.fromarray(deep).save(path)
    torch.testing.assert_close(Reader(1, "uint16")(path), exact(deep[..., None]), rtol=1e-6, atol=0)
    palette = Image.fromarray(rgba[..., :3]).quantize(8)
    palette.save(path, transparency=3)
    expected = Image.open(path).convert("RGBA")
    assert set(np.asarray(expected)[..., 3].flat) == {0, 255}
    assert torch.equal(Reader(4)(path), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_grey_is_luma(tmp_path: Path) -> None:
    """Grey files are as stored, colours weighed as by ITU-R 601."""
    path = tmp_path / "image.png"
    grey, colours = noise(6, 9), noise(6, 9, 3)
    Image.fromarray(grey).save(path)
    assert np.array_equal(np.asarray(Reader(1)(path)), grey)
    Image.fromarray(colours).save(path)
    luma = colours.astype(np.float64) @ (0.299, 0.587, 0.114)
    found = Reader(1)(path)
    assert isinstance(found, Image.Image)
    assert found.mode == "L"
    assert np.abs(np.asarray(found) - luma).max() <= 0.51
    deep = noise(6, 9, dtype=np.uint16)
    Image.fromarray(deep).save(path)
    assert np.abs(np.asarray(Reader(1)(path)) - deep / 257).max() <= 0.5
    assert np.array_equal(np.asarray(Reader(3)(colours)), colours)  # RGB is read_image's


def wrong_files(folder: Path) -> dict[str, tuple[Path, Reader, str]]:
    rgb = Image.fromarray(noise(8, 8, 3))
    made: dict[str, tuple[Any, str, Reader, str]] = {
        "no alpha": (rgb, "png", Reader(4), r"3 channels \(RGB\); data.channels is 4"),
        "palette": (rgb.quantize(4), "png", Reader(4), r"3 channels \(RGB\); data.channels is 4"),
        "grey": (rgb.convert("L"), "jpg", Reader(4), r"1 channels \(L\); data.channels is 4"),
        "inks": (rgb.convert("CMYK"), "jpg", Reader(4), "CMYK pixels: store them as grey, RGB"),
        "colours": (rgb, "png", Reader(1, "uint16"), r"3 channels \(RGB\); data.channels is 1"),
        "cut": (rgb, "jp2", Reader(3, "uint16"), "colours of 16 bits, of which Pillow keeps 8"),
    }
    found = {}
    for name, (image, ending, reader, reason) in made.items():
        image.save(folder / f"{name}.{ending}")
        found[name] = (folder / f"{name}.{ending}", reader, reason)
    deep = folder / "deep.png"
    deep.write_bytes(png_of_16_bits(noise(8, 8, 3, dtype=np.uint16)))
    found["deep"] = (deep, Reader(3, "uint16"), "colours of 16 bits, of which Pillow keeps 8")
    for name, content in (("empty", b""), ("text", b"no image"), ("no file", None)):
        if content is not None:
            (folder / f"{name}.tif").write_bytes(content)
        reason = {"empty": "empty", "text": "known format", "no file": "No such file"}[name]
        found[name] = (folder / f"{name}.tif", Reader(4), reason)
    return found


NAMES = ("no alpha", "palette", "grey", "inks", "colours", "cut", "deep", "empty", "text")


@pytest.mark.parametrize("name", [*NAMES, "no file"])
def test_wrong_files(name: str, tmp_path: Path) -> None:
    path, reader, reason = wrong_files(tmp_path)[name]
    with pytest.raises(BadImageError, match=reason) as error:
        reader(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("array", "options", "reason"),
    [
        (noise(9, 8, 3), {"planarconfig": "contig"}, r"3 channels; data.channels is 5"),
        (noise(9, 8), {}, r"1 channels; data.channels is 5"),
        (noise(9, 8, 5).astype(np.float32), {}, "float32 pixels: expected uint8 or uint16"),
        (noise(2, 9, 8, 5), {"photometric": "minisblack"}, "expected one of channels"),
        (noise(9, 8, 5), {"photometric": "separated"}, "SEPARATED pixels"),
        (noise(70, 70, 5), {"planarconfig": "contig"}, "70 x 70 pixels, more than 4096"),
    ],
)
def test_wrong_tiffs(array: Any, options: Any, reason: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, array, **{"photometric": "minisblack", **options})
    with pytest.raises(BadImageError, match=reason):
        Reader(5, max_pixels=4096)(path)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_that_end_too_early(compression: Any, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    whole, path = io.BytesIO(), tmp_path / "image.tif"
    options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(whole, noise(40, 40, 5), **options, compression=compression)
    content = whole.getvalue()
    for length in (6, 60, len(content) // 2, len(content) - 9):
        path.write_bytes(content[:length])
        with pytest.raises(BadImageError):
            Reader(5)(path)
    log = FaultLog(1, BadImagesConfig(), Reader(5))
    log.merge([BadImage(0, str(path), "it ends too early")])
    log.load_state_dict(log.state_dict())
    assert len(log.known) == 1
    path.write_bytes(content)  # repaired, before the run is resumed
    log.load_state_dict(log.state_dict())
    assert not log.known


def test_arrays_of_another_kind() -> None:
    for array in (noise(4, 4, 3), noise(4, 4), noise(4, 4, 5).astype(np.int16)):
        with pytest.raises(ValueError, match=r"expected uint8 or uint16 \[H, W, 5\]"):
            Reader(5)(array)
        with pytest.raises(BadImageError, match=r"a\.zip: 3: an array of .* \[H, W, 5\]"):
            Reader(5)(array, "a.zip: 3")


def test_a_file_of_other_channels_is_a_bad_image(tmp_path: Path) -> None:
    """Counted as one: black, and of no class."""
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(noise(8, 8, 4)).save(tmp_path / "val" / name / "right.png")
    wrong = tmp_path / "val" / "b" / "wrong.png"
    Image.fromarray(noise(8, 8, 3)).save(wrong)
    data = data_of(4)
    dataset = ImageFolder(
        tmp_path,
        "val",
        build_transform(data, False),
        bad_images=BadImagesConfig(),
        reader=Reader(4),
    )
    delivered = dataset[0, 2]
    assert [(fault.path, fault.reason) for fault in delivered.faults] == [
        (str(wrong), "3 channels (RGB); data.channels is 4")
    ]
    assert delivered.sample.label == UNREADABLE
    assert torch.equal(delivered.sample.image, torch.zeros(4, 32, 32, dtype=torch.uint8))
    assert dataset[0, 0].image.shape == (4, 32, 32)
    log = build_loader(dataset, EvalBatchSampler(3, 3), 0).faults
    log.merge(delivered.faults)
    log.load_state_dict(log.state_dict())  # reads it again, as it is read here
    assert [*log.known] == [str(wrong)]


# Transforms


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 70), (90, 60), (12, 300), (33, 32)])
def test_tensors_are_transformed_as_pictures(size: tuple[int, int], interpolation: str) -> None:
    """Each channel as Pillow does it alone: the same draws; as bytes within rounding."""
    array = noise(*size, 4) // 2 + 60  # nothing to clip, which Pillow does between the axes too
    whole = data_of(4, interpolation=interpolation)
    single = data_of(1, interpolation=interpolation)
    for training in (False, True):
        for seed in range(3):
            with seeded(seed):
                found = build_transform(whole, training)(Reader(4)(array))
            assert found.dtype == torch.uint8
            for channel in range(4):
                picture = Image.fromarray(array[..., channel].copy())
                with seeded(seed):
                    expected = build_transform(single, training)(picture)
                difference = (found[channel].int() - expected[0].int()).abs()
                assert difference.max() <= 2, (training, channel)


def test_16_bits_are_kept_by_resizing() -> None:
    """Against Pillow's filter in floating point; and beyond the values that bytes have."""
    array = noise(50, 70, 2, dtype=np.uint16) // 16 + 30000
    data = data_of(2, pixels="uint16", test_crop_ratio=1.0, interpolation="bilinear")
    found = build_transform(data, False)(Reader(2, "uint16")(array))
    assert found.dtype == torch.float32
    for channel in range(2):
        picture = Image.fromarray((array[..., channel] / 257).astype(np.float32))
        wide = np.asarray(picture.resize((44, 32), Image.Resampling.BILINEAR))
        torch.testing.assert_close(found[channel], torch.from_numpy(wide[:, 6:38].copy()))
    assert (found - found.round()).abs().max() > 0.4


def test_16_bits_stay_in_range() -> None:
    """A bicubic filter leaves the range of its input at edges."""
    array = np.zeros((64, 64, 2), np.uint16)
    array[20:40, 20:40] = 65535
    image = Reader(2, "uint16")(array)
    for training in (False, True):
        with seeded(1):
            found = build_transform(data_of(2, pixels="uint16"), training)(image)
        assert found.min() == 0
        assert found.max() == 255


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_normalised_values(channels: int) -> None:
    """(value in [0, 1] - mean) / std in float64."""
    rng = np.random.default_rng(0)
    mean, std = rng.uniform(0, 1, channels).tolist(), rng.uniform(0.1, 1, channels).tolist()
    array = noise(32, 32, channels, dtype=np.uint16)
    data = data_of(channels, pixels="uint16", mean=mean, std=std, test_crop_ratio=1.0)
    images = build_transform(data, False)(Reader(channels, "uint16")(array))[None]
    batch = {"images": images, "labels": torch.zeros(1, dtype=torch.int64)}
    found, _ = BatchPreprocessor(data, 2)(batch, False)
    expected = torch.from_numpy((array / 65535 - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m3-w3", "3a", None])
def test_policies_of_grey(policy: str | None) -> None:
    """A grey image is augmented as its RGB copy is: the same operations on the same values."""
    # Smooth: operations that mix the channels in floating point round apart on noise.
    row = np.linspace(0, 250, 60).astype(np.uint8)
    grey = np.minimum(row[:, None], row[None, ::-1])
    settings = {"auto_augment": policy, "color_jitter": 0.3}
    one, three = (build_transform(data_of(c, **settings), True) for c in (1, 3))
    changed = 0
    plain = build_transform(data_of(1), True)
    for seed in range(12):
        results = []
        for transform, image in (
            (one, Image.fromarray(grey)),
            (three, Image.fromarray(np.stack([grey] * 3, 2))),
            (plain, Image.fromarray(grey)),
        ):
            with seeded(seed):
                random.seed(seed)
                results.append(transform(image))
        assert results[0].shape == (1, 32, 32)
        assert (results[0][0].int() - results[1][0].int()).abs().max() <= 2, seed
        changed += not torch.equal(results[0], results[2])
    assert changed > 6


def test_batches_of_grey_and_of_bands() -> None:
    """In memory: a channel of a batch is resized as it is alone."""
    images = torch.from_numpy(noise(3, 5, 40, 30))
    seeds = [1, 2, 3]
    found = BatchAugment(data_of(5))(images, seeds)
    for channel in range(5):
        alone = BatchAugment(data_of(1))(images[:, channel : channel + 1], seeds)
        assert torch.equal(found[:, channel : channel + 1], alone)


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_pictures_show_three_channels(channels: int, shown: list[int]) -> None:
    array = noise(7, 9, channels)
    data = data_of(channels)
    preprocess = BatchPreprocessor(data, 2)
    images = torch.from_numpy(array).permute(2, 0, 1)[None]
    images, _ = preprocess({"images": images, "labels": torch.zeros(1)}, False)
    found = to_pixels(images, preprocess.mean, preprocess.std)
    assert np.array_equal(found[0], array[..., shown])


# Settings


def settings_of(channels: int, model: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    ones = {"mean": [0.5] * channels, "std": [0.2] * channels}
    return {
        "model": {"name": "resnet18", "num_classes": 4, "timm_args": dict(SMALL), **(model or {})},
        "data": {"root": "none", "input_size": 32, "channels": channels, **ones, **data},
        "epochs": 1,
        "total_batch_size": 4,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "lr": 0.1},
    }


@pytest.mark.parametrize(
    ("channels", "data", "message"),
    [
        (4, {"mean": [0.5, 0.5, 0.5]}, r"data\.mean = .*expected a list of 4 numbers, one a chan"),
        (1, {"std": [0.5, 0.5, 0.5]}, r"data\.std = .*expected a list of 1 numbers, one a channel"),
        (4, {"auto_augment": "rand-m9"}, r"data\.auto_augment = .*null: it works on grey and RGB"),
        (4, {"color_jitter": 0.4}, r"data\.color_jitter = .*null: it works on grey and RGB images"),
        (3, {"pixels": "uint16", "color_jitter": 0.4}, r"null: .*data\.pixels = 'uint16'"),
        (4, {"decoder": "fast"}, r"pillow: the fast decoder gives RGB in bytes"),
        (1, {"decoder": "fast"}, r"pillow: the fast decoder gives RGB in bytes"),
        (4, {"interpolation": "lanczos"}, "bilinear or bicubic: these images are resized as tens"),
        (4, {"pixels": "uint16", "memory": {}}, "null beside data.pixels uint16: images are held"),
        (0, {}, r"data\.channels = 0: expected an integer >= 1"),
        (3, {"pixels": "uint32"}, r"expected one of 'uint8', 'uint16'; did you mean"),
        (
            3,
            {"input_size": [32]},
            r"input_size = \[32\]: expected an integer .* or a list of 2 num",
        ),
        (
            3,
            {"input_size": [32, 0]},
            r"expected an integer >= 1 and <= 8192 or a list of 2 numbers",
        ),
    ],
)
def test_wrong_settings(channels: int, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(settings_of(channels, **data))


def test_the_number_of_channels_is_set_once() -> None:
    """``data.channels`` builds the network; timm's own name for it must agree."""
    config = config_from_mapping(settings_of(4))
    assert config.model.timm_args == {**SMALL, "in_chans": 4}
    assert build_model(settings_of(4)).conv1.in_channels == 4  # type: ignore[union-attr]
    same = {"timm_args": {**SMALL, "in_chans": 4}}
    assert config_from_mapping(settings_of(4, same)) == config
    with pytest.raises(ConfigError, match=r"timm_args = .*expected 5, which data\.channels says"):
        config_from_mapping(settings_of(5, same))
    assert "in_chans" not in config_from_mapping(settings_of(3)).model.timm_args


def test_a_plan_is_derived_for_other_channels() -> None:
    model = {"kernel_warehouse": {"plan": "auto"}}
    network = build_model(settings_of(5, model))
    assert network(torch.randn(2, 5, 32, 32)).shape == (2, 4)


# First layers


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_first_layers_for_rgb_are_adapted(
    channels: int, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One channel: as the RGB network of its copies. More: channel i has the weights of colour
    i mod 3, times 3 / C, which is what these networks compute of the mixture below."""
    caplog.set_level(logging.INFO, "kw")
    torch.manual_seed(0)
    args: dict[str, Any] = SMALL if name == "resnet18" else {"img_size": 32, "depth": 2}
    static = timm.create_model(name, num_classes=4, **args).eval()
    path = tmp_path / "static.pth"
    torch.save(static.state_dict(), path)
    model = {"name": name, "timm_args": dict(args), "weights": str(path)}
    config = config_from_mapping(settings_of(channels, model))
    network = start_network(config.model).eval()
    images = torch.randn(2, channels, 32, 32)
    if channels == 1:
        colours = images.expand(-1, 3, -1, -1)
    else:
        parts = [images[:, colour::3].sum(1) for colour in range(3)]
        colours = torch.stack(parts, 1) * 3 / channels
    with torch.no_grad():
        torch.testing.assert_close(network(images), static(colours), rtol=1e-4, atol=1e-5)
    told = [line for line in caplog.messages if "first layer's weights" in line]
    assert len(told) == 1
    assert f"for 3 channels, are taken for {channels}" in told[0]


def test_first_layers_for_other_channels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "static.pth"
    torch.save(build_model(settings_of(2)).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"conv1\.weight is \[64, 2, 7, 7\]"):
        build_model(settings_of(4, {"weights": str(path)}))


def test_converted_weights_are_adapted(tmp_path: Path) -> None:
    """The stem of a KernelWarehouse network is a static layer."""
    dynamic = {"kernel_warehouse": {"plan": "resnet18", "start": "paper"}}
    torch.manual_seed(0)
    trained = build_model(settings_of(3, dynamic)).eval()
    path = tmp_path / "converted.pth"
    torch.save(trained.state_dict(), path)
    config = config_from_mapping(settings_of(1, {**dynamic, "weights": str(path)}))
    network, images = start_network(config.model).eval(), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = trained(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
