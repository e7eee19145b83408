"""Inputs that are not square, of every kind of image: from files to trained and exported networks.

A consumer of ``data.input_size`` or ``data.channels`` that was missed would compute something else
without a word.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, SMALL
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn

import kw
from kw.benchmark.cases import load_cases
from kw.benchmark.conditions import Conditions
from kw.benchmark.results import Result
from kw.benchmark.run import run_case
from kw.config import ConfigError, config_from_mapping, to_yaml
from kw.config.data_schema import DataConfig
from kw.data.batch_augment import BatchAugment
from kw.data.seeding import seeded
from kw.data.transforms import build_transform
from kw.deploy import export, read_source
from kw.deploy.description import Description, InputRange, preprocessing
from kw.deploy.export import Options
from kw.models import build_network
from kw.models.complexity import analyze, count_macs
from kw.training import evaluate_checkpoint, train
from kw.training.run_pictures import training_batch

HEIGHT, WIDTH = SIZE = (64, 96)

# Name: channels, settings of the data, ending of the files.
KINDS: dict[str, tuple[int, dict[str, Any], str]] = {
    "rgb": (3, {"auto_augment": "rand-m5"}, "png"),
    "rgb in memory": (3, {"memory": {"place": "host", "size": 60}}, "png"),
    "grey": (1, {"auto_augment": "augmix-m3-w3"}, "png"),
    "grey in memory": (1, {"memory": {"place": "host"}, "color_jitter": 0.2}, "png"),
    "rgba": (4, {}, "png"),
    "rgba in memory": (4, {"memory": {"place": "host"}}, "png"),
    "bands of 16 bits": (5, {"pixels": "uint16"}, "tif"),
}


def write_set(root: Path, channels: int, ending: str) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                array = rng.normal(60 + 40 * label, 12, (50, 70, channels)).clip(0, 255)
                path = root / split / name / f"{i}.{ending}"
                if ending == "tif":
                    import tifffile

                    tifffile.imwrite(path, (array * 257).astype(np.uint16), planarconfig="contig")
                else:
                    pixels = array.astype(np.uint8)
                    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """By kind: a configuration and the work directory of its run, of one epoch."""
    return functools.cache(lambda kind: train_one(kind, tmp_path_factory))


@pytest.fixture
def run(request: Any, runs: Any) -> tuple[Any, Path]:
    kind = request.node.callspec.params["kind"]
    if KINDS[kind][2] == "tif":
        pytest.importorskip("tifffile")
    found: tuple[Any, Path] = runs(kind)
    return found


def train_one(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    channels, settings, ending = KINDS[kind]
    root = tmp_path_factory.mktemp("set")
    write_set(root, channels, ending)
    data = {
        "root": str(root),
        "input_size": list(SIZE),
        "channels": channels,
        "mean": [0.1 * i + 0.3 for i in range(channels)],
        "std": [0.05 * i + 0.2 for i in range(channels)],
        "workers": 0,
        "random_erasing": {"probability": 0.5, "mode": "rand"},
        "mixup": 0.2,
        "cutmix": 1.0,
        **settings,
    }
    config = config_from_mapping(
        {
            "model": {
                "name": "resnet18",
                "num_classes": 4,
                "timm_args": dict(SMALL),
                "kernel_warehouse": {"plan": "resnet18", "start": "paper"},
            },
            "data": data,
            "epochs": 1,
            "total_batch_size": 8,
            "batch_size": 8,
            "optimizer": {"name": "sgd", "lr": 0.01},
        }
    )
    work_dir = tmp_path_factory.mktemp("run")
    figures = train(config, work_dir)
    assert figures["images"] == 12
    (work_dir / "config.yaml").write_text(to_yaml(config))
    return config, work_dir


def images_of(config: Any) -> list[Path]:
    return sorted(Path(config.data.root, "val").rglob("*.*"))


def expected_input(config: Any, file: Path) -> torch.Tensor:
    """What the network sees of an image, computed here: [C, H, W]."""
    data = config.data
    if file.suffix == ".tif":
        import tifffile

        array = tifffile.imread(file) / 257
    else:
        array = np.asarray(Image.open(file)).astype(np.float64)
    array = array.reshape(50, 70, data.channels)
    tall, wide = round(50 * 109 / 70), 109  # floor(64 / 0.875) = 73 and 109 are to be covered
    assert tall >= 73
    top, left = round((tall - HEIGHT) / 2), round((wide - WIDTH) / 2)
    parts = []
    for channel in range(data.channels):
        plane = Image.fromarray(array[..., channel].astype(np.float32))
        resized = np.asarray(plane.resize((wide, tall), Image.Resampling.BICUBIC)).clip(0, 255)
        part = resized[top : top + HEIGHT, left : left + WIDTH]
        parts.append((part / 255 - data.mean[channel]) / data.std[channel])
    return torch.from_numpy(np.stack(parts)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_network_sees(run: tuple[Any, Path], kind: str) -> None:
    """In training a batch of the shape; in use the values, within the rounding of bytes."""
    config, work_dir = run
    images, targets, _ = training_batch(config, 1, 1)
    assert images.shape == (8, config.data.channels, *SIZE)
    assert targets.shape == (8, 4)
    assert images.isfinite().all()
    classifier = kw.load(work_dir)
    for file in images_of(config)[::5]:
        found = classifier.normalise(classifier.read(file)[None])[0]
        levels = (found - expected_input(config, file)) * 255
        levels = levels * torch.tensor(config.data.std)[:, None, None]
        assert levels.abs().max() <= (0.01 if config.data.pixels == "uint16" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_test_is_the_runs_evaluation(run: tuple[Any, Path], kind: str) -> None:
    config, work_dir = run
    checkpoint = work_dir / "epoch_1.pth"
    found = evaluate_checkpoint(config, checkpoint)
    classifier = kw.load(checkpoint)
    files = images_of(config)
    logits = classifier.logits(torch.stack([classifier.read(file) for file in files]))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    expected = float(nn.functional.cross_entropy(logits, labels))
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        pytest.param("rgba", "onnx", marks=pytest.mark.slow),
        ("bands of 16 bits", "safetensors"),
        pytest.param("bands of 16 bits", "onnx", marks=pytest.mark.slow),
        pytest.param("grey", "onnx", marks=pytest.mark.slow),
        pytest.param("grey", "pt2", marks=pytest.mark.slow),
    ],
)
def test_exported_files_agree(
    run: tuple[Any, Path], kind: str, ending: str, tmp_path: Path
) -> None:
    """Verified on real images; of the exact size, and of others where sizes are open."""
    if ending == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    config, work_dir = run
    classifier, files = kw.load(work_dir), images_of(config)
    read = [classifier.read(file) for file in files]
    channels = config.data.channels
    written = export(read_source(work_dir), tmp_path / f"a.{ending}", Options(), read)
    assert (written.input.size, written.input.channels) == (SIZE, channels)
    assert written.random.shapes[0] == (1, channels, *SIZE)
    assert written.real is not None
    loaded, three = kw.load(written.path), torch.stack(read[:3])
    assert loaded.description.input == written.input
    expected = classifier.logits(three)
    torch.testing.assert_close(loaded.logits(three), expected, rtol=1e-3, atol=1e-4)
    assert loaded.predict(files[:1], k=1)[0][0].label == int(expected[0].argmax())
    if ending == "onnx":
        other = torch.randn(1, channels, WIDTH, HEIGHT)
        torch.testing.assert_close(loaded(other), classifier(other), rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match=rf"takes \[B, {channels}, H, W\]"):
            loaded(torch.randn(1, channels + 1, *SIZE))
    card = written.card.read_text()
    assert "| resize to cover | [73, 109] |" in card
    assert "| centre crop | [64, 96] |" in card
    assert f"float32 [batch, {channels}, height, width]" in card


@pytest.mark.parametrize("kind", ["rgba", pytest.param("grey", marks=pytest.mark.slow)])
def test_tools(run: tuple[Any, Path], kind: str, tool: Any, tmp_path: Path, capsys: Any) -> None:
    """Those that build inputs of their own, or draw images."""
    pytest.importorskip("matplotlib")
    config, work_dir = run
    file, out = work_dir / "config.yaml", tmp_path / "picture.png"
    a, b, *_ = images_of(config)
    for words in (
        ("batches", file),
        ("cam", work_dir, a, b),
        ("kernels", work_dir, a, b),
        ("attention", work_dir, "--images", 4),
    ):
        tool("kw visualize", *words, "--out", out)
        assert Image.open(out).width > 100
        out.unlink()
    tool("kw predict", work_dir, a.parent, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["images"]) == 3
    assert not found["unreadable"]
    tool("kw inspect backends", file, "--batch-size", 2)
    capsys.readouterr()
    tool("kw benchmark loading", file, "--images", 16)
    # Images in memory are augmented in batches, which AugMix cannot do.
    is_refused = "host: not measured" in capsys.readouterr().out
    assert is_refused == str(config.data.auto_augment).startswith("augmix")
    torch.manual_seed(0)
    static = build_network(replace(config.model, kernel_warehouse=None))
    torch.save(static.state_dict(), tmp_path / "static.pth")
    for options in ((), ("--images", a.parent)):
        target, weights = tmp_path / "converted.pth", tmp_path / "static.pth"
        tool("kw convert network", file, target, "--weights", weights, *options)
    text = capsys.readouterr().out
    assert text.count("100.00%") == 8  # of the weights are kept, in four warehouses, twice


# Values


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Random blocks: smooth enough for filters that round differently."""
    rng = np.random.default_rng(seed)
    small = rng.integers(60, 190, (max(height // 8, 2), max(width // 8, 2), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def data_of(size: Any = SIZE, **settings: Any) -> DataConfig:
    return DataConfig(root="unused", input_size=list(size), **settings)


@pytest.mark.parametrize("target", [(64, 96), (96, 64), (33, 50)])
@pytest.mark.parametrize("size", [(50, 70), (200, 90), (64, 96), (300, 301)])
def test_test_images_cover_the_input(size: tuple[int, int], target: tuple[int, int]) -> None:
    """The least size of the image's own shape that covers input / ratio; its middle."""
    image, data = picture(*size), data_of(target, test_crop_ratio=0.8)
    cover = [int(side / 0.8 + 1e-9) for side in target]
    scale = max(cover[0] / size[0], cover[1] / size[1])
    tall, wide = round(size[0] * scale), round(size[1] * scale)
    resized = image.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = round((wide - target[1]) / 2), round((tall - target[0]) / 2)
    expected = np.asarray(resized.crop((left, top, left + target[1], top + target[0])))
    found = build_transform(data, False)(image)
    assert torch.equal(found, torch.from_numpy(expected.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(9, 3000), (3000, 9)])
def test_of_long_images_the_middle_is_resized(size: tuple[int, int]) -> None:
    """What is left out of the resizing does not show."""
    image, data = picture(*size), data_of(test_crop_ratio=1.0)
    scale = max(HEIGHT / size[0], WIDTH / size[1])
    tall, wide = round(size[0] * scale), round(size[1] * scale)
    resized = image.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = round((wide - WIDTH) / 2), round((tall - HEIGHT) / 2)
    expected = np.asarray(resized.crop((left, top, left + WIDTH, top + HEIGHT))).astype(int)
    found = build_transform(data, False)(image).permute(1, 2, 0).numpy()
    # The middle may lie half a pixel of the image apart.
    assert np.abs(found - expected).max() <= 12
    assert np.abs(found - expected).mean() < 4


def test_training_images_are_the_drawn_part() -> None:
    """The part that a square input would get, resized to height and width."""
    image, data = picture(80, 110), data_of(horizontal_flip=0.0)
    for seed in range(5):
        with seeded(seed):
            found = build_transform(data, True)(image)
        with seeded(seed):
            place = RandomResizedCropAndInterpolation.get_params(
                image, tuple(data.crop_scale), tuple(data.crop_ratio)
            )
        top, left, tall, wide = place
        part = image.crop((left, top, left + wide, top + tall))
        expected = np.asarray(part.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        assert torch.equal(found, torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_batches_in_memory_are_the_drawn_parts() -> None:
    augment, size = BatchAugment(data_of(horizontal_flip=0.0)), (80, 110)
    pictures = [picture(*size, seed) for seed in range(4)]
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    choices = augment.choose([1, 2, 3, 4], *size)
    found = augment.apply(images, choices)
    assert found.shape == (4, 3, *SIZE)
    for i, image in enumerate(pictures):
        left, top = int(choices.left[i]), int(choices.top[i])
        box = (left, top, left + int(choices.width[i]), top + int(choices.height[i]))
        part = image.crop(box).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        difference = found[i].permute(1, 2, 0).int() - torch.from_numpy(np.array(part)).int()
        assert difference.abs().max() <= 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [64, 33])
def test_a_list_of_equal_sides_is_a_square(size: int, training: bool) -> None:
    image = picture(70, 90)
    results = []
    for value in (size, [size, size]):
        data = DataConfig(root="unused", input_size=value)
        with seeded(3):
            results.append(build_transform(data, training)(image))
    assert torch.equal(*results)
    assert preprocessing(data) == preprocessing(DataConfig(root="unused", input_size=size))
    assert InputRange.of(data) == InputRange(size)


def network_of(size: Any, **model: Any) -> Any:
    settings = {"name": "resnet18", "num_classes": 4, "timm_args": dict(SMALL), **model}
    data = {"root": "none", "input_size": size}
    run = {"epochs": 1, "total_batch_size": 4, "batch_size": 4, "optimizer": {"lr": 0.1}}
    return config_from_mapping({"model": settings, "data": data, **run})


def test_costs_are_those_of_the_shape() -> None:
    """Convolutions cost in proportion to the area, and by another count."""
    costs = {str(size): analyze(network_of(size)).macs_static for size in (64, [64, 96], [96, 64])}
    classifier = 16 * 4
    assert (costs["[64, 96]"] - classifier) * 2 == (costs["64"] - classifier) * 3
    assert costs["[64, 96]"] == costs["[96, 64]"]
    with torch.device("meta"):
        network = build_network(network_of(64).model).eval().requires_grad_(False)
        assert count_macs(network, torch.empty(1, 3, 64, 96)) == costs["[64, 96]"]


def test_benchmarks_measure_the_shape(tmp_path: Path) -> None:
    kernels = {"kernel_warehouse": {"plan": "resnet18", "start": "paper"}}
    (tmp_path / "mine.yaml").write_text(to_yaml(network_of([64, 96], **kernels)))
    (case,) = load_cases([str(tmp_path / "mine.yaml")])
    assert case.input_size == SIZE
    inputs, _ = case.sources[0].example(2, SIZE)
    assert inputs.shape == (2, 3, *SIZE)
    conditions = Conditions("inference", "cpu", "float32", 2, case.input_size, 1, rounds=1)
    assert "64x96" in conditions.words()
    assert "-64x96-" in conditions.file_name("mine", "cpu")
    assert "-64-" in Conditions("inference", "cpu", "float32", 2, 64, 1).file_name("mine", "cpu")
    result = run_case(case, conditions, ["auto"])
    again = Result.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.conditions == conditions


def test_position_embeddings_of_a_shape(tmp_path: Path) -> None:
    """A transformer takes the shape that it was built for, in files too."""
    name, sizes = "deit_tiny_patch16_224", ([32, 48], [48, 32])
    models = [{"name": name, "timm_args": {"img_size": size, "depth": 2}} for size in sizes]
    config = network_of(sizes[0], **models[0])
    assert build_network(config.model)(torch.randn(1, 3, 32, 48)).shape == (1, 4)
    with pytest.raises(ConfigError, match=r"data\.input_size \[32, 48\].*images \[1, 3, 32, 48\]"):
        analyze(network_of(sizes[0], **models[1]))
    state = {"meta": {"config": to_yaml(config)}, "state_dict": build_network(config.model)}
    torch.save({**state, "state_dict": state["state_dict"].state_dict()}, tmp_path / "best.pth")
    written = export(read_source(tmp_path / "best.pth"), tmp_path / "a.pt2", Options())
    assert written.input == InputRange((32, 48))
    assert written.notes[0].startswith("the file takes images of 32 x 48 only")


def test_descriptions_from_before_channels_are_read() -> None:
    config = network_of(64)
    described = Description("mine", list("abcd"), config, "model", 1, {}, InputRange(64, 33))
    texts = described.to_strings()
    old = json.loads(texts["input"])
    assert old.pop("channels") == 3
    found = Description.from_strings({**texts, "input": json.dumps(old)}, "file")
    assert found.input == InputRange(64, 33)


@pytest.mark.parametrize("kind", ["rgb", "bands of 16 bits"])
def test_tensors_that_read_did_not_give(run: tuple[Any, Path], kind: str) -> None:
    config, work_dir = run
    classifier, channels = kw.load(work_dir), config.data.channels
    dtype = torch.float32 if config.data.pixels == "uint16" else torch.uint8
    right = torch.zeros(channels, *SIZE, dtype=dtype)
    assert len(classifier.predict(right)[0]) == 4
    other = torch.uint8 if dtype == torch.float32 else torch.float32
    for wrong in (right.transpose(1, 2), right[:, :64, :64], right[:0], right.to(other)):
        with pytest.raises(ValueError, match=rf"\[{channels}, 64, 96\], as read\(\) gives it"):
            classifier.predict(wrong)
