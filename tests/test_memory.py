"""Images in memory: what a batch is made of, against Pillow, torchvision, timm and the files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import kw.data.memory as memory_module
from kw.config import config_from_mapping
from kw.config.data_schema import DataConfig
from kw.config.schema import Config
from kw.data import DataError, Loader, derive_seed, open_training, open_validation, uniform_draws
from kw.data.batch_augment import BatchAugment, Choices
from kw.data.resample import axis_weights, resample
from kw.training import load_checkpoint, train

CPU = torch.device("cpu")
Settings = dict[str, Any]


def noise(count: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    )


def augment(**settings: Any) -> BatchAugment:
    return BatchAugment(DataConfig(root="unused", **{"input_size": 16, **settings}))


# --- what is drawn ---------------------------------------------------------------------------


def test_draws_are_splitmix64() -> None:
    """The first outputs of the generator's public-domain C code for this seed (Vigna, 2015)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    draws = uniform_draws([0, 1234567], 4)
    assert draws[1].tolist() == [(value >> 11) / 2**53 for value in expected]
    assert draws.shape == (2, 4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 60), (60, 20)])
def test_rectangles_are_distributed_as_timms(height: int, width: int) -> None:
    """Mean and spread of place and extent, and how often the whole rectangle was refused."""
    config = {"crop_scale": [0.3, 1.0], "crop_ratio": [0.7, 1.4]}
    chosen = augment(**config).choose([derive_seed(i) for i in range(4000)], height, width)
    random.seed(0)
    image = Image.new("RGB", (width, height))
    expected = np.array(
        [
            RandomResizedCropAndInterpolation.get_params(image, (0.3, 1.0), (0.7, 1.4))
            for _ in range(4000)
        ]
    ).T
    for found, wanted in zip(chosen[:2], expected[:2], strict=True):
        assert found.mean() == pytest.approx(wanted.mean(), abs=0.05 * height)
        assert found.std() == pytest.approx(wanted.std(), rel=0.1)
    for found, wanted in zip((chosen.height, chosen.width), expected[2:], strict=True):
        assert found.mean() == pytest.approx(wanted.mean(), rel=0.02)
        assert found.std() == pytest.approx(wanted.std(), rel=0.1, abs=0.02)
    assert (chosen.top + chosen.height).max() <= height
    assert (chosen.left + chosen.width).max() <= width
    assert min(chosen.top.min(), chosen.left.min()) >= 0
    assert chosen.mirror.mean() == pytest.approx(0.5, abs=0.03)


def test_an_image_without_a_fitting_rectangle_is_cut_in_the_middle() -> None:
    settings = {"crop_scale": [1.0, 1.0], "crop_ratio": [0.46, 2.16]}
    chosen = augment(**settings).choose([1, 2], 10, 41)
    image = Image.new("RGB", (41, 10))
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(
        image, (1.0, 1.0), (0.46, 2.16)
    )
    assert (width, left) == (22, 9)
    for name, value in (("top", top), ("left", left), ("height", height), ("width", width)):
        assert getattr(chosen, name).tolist() == [value, value]


# --- what is done ----------------------------------------------------------------------------

TOP, LEFT, HEIGHT, WIDTH = (0, 3, 11, 5), (0, 9, 2, 30), (24, 13, 9, 3), (40, 20, 37, 2)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_resampling_is_torchvisions(name: str) -> None:
    """Four rectangles of one batch, larger and smaller than the output, against one at a time."""
    images = noise(4, 24, 40)
    places = [torch.tensor(values) for values in (TOP, HEIGHT, LEFT, WIDTH)]
    rows = axis_weights(*places[:2], 24, 12, name)
    found = resample(images, rows, axis_weights(*places[2:], 40, 12, name))
    for each, image, *place in zip(found, images, TOP, LEFT, HEIGHT, WIDTH, strict=True):
        expected = F.resized_crop(
            image.float(), *place, size=[12, 12], interpolation=InterpolationMode(name)
        )
        torch.testing.assert_close(each, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_augmented_images_are_pillows(name: str) -> None:
    """Cut, resized and mirrored; Pillow rounds once more in between, and clips where filters
    overshoot, for which these images have room."""
    images = noise(4, 24, 40) // 2 + 64
    mirror = np.array([True, False, True, False])
    choices = Choices(*map(np.array, (TOP, LEFT, HEIGHT, WIDTH)), mirror)
    found = augment(input_size=12, interpolation=name).apply(images, choices)
    assert found.dtype == torch.uint8
    for i, image in enumerate(images):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        box = (LEFT[i], TOP[i], LEFT[i] + WIDTH[i], TOP[i] + HEIGHT[i])
        pillow = pillow.crop(box).resize((12, 12), Image.Resampling[name.upper()])
        if mirror[i]:
            pillow = pillow.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = found[i].permute(1, 2, 0).int() - torch.from_numpy(np.array(pillow)).int()
        assert difference.abs().max() <= (0 if name == "nearest" else 2)
        assert difference.abs().float().mean() < 0.3


def test_an_image_does_not_depend_on_its_batch() -> None:
    images, seeds = noise(5, 20, 20), [derive_seed(i) for i in range(5)]
    step = augment()
    whole = step(images, seeds)
    alone = [step(image[None], [seed]) for image, seed in zip(images, seeds, strict=True)]
    assert (whole.int() - torch.cat(alone).int()).abs().max() <= 1  # a matrix product's rounding
    assert len({each.numpy().tobytes() for each in whole}) == 5


# --- loaders ---------------------------------------------------------------------------------


@pytest.fixture
def held(settings: Settings) -> Settings:
    """The tests' run, with its images in memory."""
    settings["data"]["memory"] = {"place": "device"}
    return settings


def configured(settings: Settings, **data: Any) -> Config:
    return config_from_mapping(
        {**settings, "data": {**settings["data"], **data}}, check_model_name=False
    )


def batches(loader: Loader, epoch: int = 1, start: int = 0) -> list[dict[str, Any]]:
    sampler: Any = loader.batch_sampler
    sampler.set_epoch(epoch, start)
    return list(loader)


def test_memory_holds_bytes_once(held: Settings) -> None:
    loader: Any = open_training(configured(held), CPU, 0, 1)
    images = loader.dataset.images
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (64, 3, 20, 20))
    assert loader.dataset.images.numel() == 64 * 3 * 20 * 20
    share: Any = open_validation(configured(held), CPU, 1, 2)
    assert len(share.dataset.images) == 9  # of 19: this process's
    (batch,) = [batch for batch in share if len(batch["labels"]) == 9]
    assert (batch["images"].dtype, tuple(batch["images"].shape)) == (torch.uint8, (9, 3, 32, 32))


@pytest.mark.parametrize("place", ["device", "host"])
def test_batches_do_not_depend_on_processes_workers_or_resumption(
    held: Settings, place: str
) -> None:
    memory = {"place": place}
    whole = batches(open_training(configured(held, memory=memory), CPU, 0, 1))
    assert len(whole) == 4
    held["batch_size"] = 8
    shares = [
        batches(open_training(configured(held, memory=memory, workers=rank), CPU, rank, 2))
        for rank in range(2)
    ]
    for key in ("images", "labels", "indices"):
        for one, *two in zip(whole, *shares, strict=True):
            assert torch.equal(one[key], torch.cat([share[key] for share in two]))
    loader = open_training(configured(held, memory=memory), CPU, 0, 2)
    later = batches(loader, start=2)
    assert [batch["key"] for batch in later] == [batch["key"] for batch in shares[0][2:]]
    assert all(map(torch.equal, *[[b["images"] for b in x] for x in (later, shares[0][2:])]))
    other = batches(loader, epoch=2)
    assert not torch.equal(other[0]["images"], shares[0][0]["images"])


def test_a_resumed_run_is_the_same_to_the_bit(held: Settings, tmp_path: Path) -> None:
    held["checkpoint"] = {"updates": 3, "keep": 9}
    held["data"]["mixup"] = 0.8
    train(config_from_mapping(held), tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole/epoch_0_update_3.pth", tmp_path / "cut")
    train(config_from_mapping(held), tmp_path / "cut", resume=True)
    whole, cut = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "cut"))
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    """The tests' images, two of them no images."""
    root = tmp_path / "damaged"
    shutil.copytree(images, root)
    (root / "train/cat/3.png").write_bytes(b"no image")
    (root / "val/bird/2.png").write_bytes(b"no image")
    return root


def test_bad_files_are_treated_as_from_files(held: Settings, damaged: Path) -> None:
    """The same substitutes, epoch by epoch; black and of no class in evaluation; each told once."""
    allowed = {"root": str(damaged), "bad_images": {"max_fraction": 0.1}}
    from_memory, from_files = (
        open_training(configured(held, memory=memory, **allowed), CPU, 0, 1)
        for memory in (held["data"]["memory"], None)
    )
    labels = [
        [torch.cat([b["labels"] for b in batches(loader, epoch)]) for epoch in range(4)]
        for loader in (from_memory, from_files)
    ]
    assert all(map(torch.equal, *labels))
    (fault,) = from_memory.faults.take()
    assert fault == from_files.faults.take()[0]
    assert Path(fault.path) == damaged / "train/cat/3.png"


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_is_that_of_files(held: Settings, damaged: Path, world_size: int) -> None:
    allowed = {"root": str(damaged), "bad_images": {"max_fraction": 0.1}}
    for rank in range(world_size):
        found, expected = (
            list(open_validation(configured(held, memory=memory, **allowed), CPU, rank, world_size))
            for memory in (held["data"]["memory"], None)
        )
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in ("images", "labels", "indices"))


@pytest.mark.parametrize("opened", [open_training, open_validation])
def test_a_bad_file_may_be_listed_twice(
    held: Settings, damaged: Path, opened: Callable[..., Loader]
) -> None:
    """Neither line has the image, nor the label, of what is held in its place."""
    files = sorted(path.relative_to(damaged) for path in damaged.glob("train/*/*.png"))
    lines = [f"{file},{file.parts[1]}" for file in files]
    bad = next(line for line in lines if line.startswith("train/cat/3.png"))
    for split in ("train", "val"):
        (damaged / f"{split}.csv").write_text("\n".join(["file,label", *lines, bad, ""]))
    table = {"root": str(damaged), "dataset": "csv", "bad_images": {"max_fraction": 0.1}}
    from_memory, from_files = (
        opened(configured(held, memory=memory, **table), CPU, 0, 1)
        for memory in (held["data"]["memory"], None)
    )
    for epoch in range(3):
        found, expected = (
            [b["labels"].tolist() for b in batches(loader, epoch)]
            if opened is open_training
            else [b["labels"].tolist() for b in loader]
            for loader in (from_memory, from_files)
        )
        assert found == expected
    log = from_memory.faults
    assert len(log.merge(log.take())) == 1  # a file is told once


def test_pictures_of_a_run(held: Settings, tmp_path: Path) -> None:
    """They are of single images, and change nothing."""
    runs = [tmp_path / name for name in ("with", "without")]
    for work_dir, pictures in zip(runs, ({"images": 4}, None), strict=True):
        train(configured({**held, "pictures": pictures}), work_dir)
    one, other = (load_checkpoint(work_dir / "last.pth")["state_dict"] for work_dir in runs)
    assert all(torch.equal(one[name], other[name]) for name in other)
    events = EventAccumulator(str(runs[0] / "tensorboard"), {"images": 0}).Reload()
    assert len(events.Images("pictures/attention")) == len(events.Images("pictures/batch")) == 2


# --- refusals --------------------------------------------------------------------------------


@pytest.fixture
def unequal(images: Path, tmp_path: Path) -> Path:
    root = tmp_path / "unequal"
    shutil.copytree(images, root)
    Image.new("RGB", (31, 22), (255, 0, 0)).save(root / "train/dog/5.png")
    return root


def test_images_of_different_sizes_need_a_size(
    held: Settings, unequal: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"20 x 20 .*dog/5\.png has 31 x 22; set data\.memory\.siz"):
        train(configured(held, root=str(unequal)), tmp_path / "run")
    squares = {"place": "device", "size": 12}
    loader: Any = open_training(configured(held, root=str(unequal), memory=squares), CPU, 0, 1)
    assert tuple(loader.dataset.images.shape) == (64, 3, 12, 12)
    red = loader.dataset.images[
        [loader.dataset.path(i).name for i in range(64)].index("5.png") + 32
    ]
    assert red.float().mean((1, 2)).tolist() == [255, 0, 0]


def test_what_does_not_fit_is_refused_before_it_is_read(
    held: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 images of 1200 bytes: 76,800.
    monkeypatch.setattr(memory_module, "_free_bytes", lambda place: 76_800 / 0.91)
    with pytest.raises(DataError, match=r"64 images of 20 x 20 pixels take .* more than 90% of"):
        open_training(configured(held), CPU, 0, 1)
    monkeypatch.setattr(memory_module, "_free_bytes", lambda place: 76_800 / 0.9 + 1)
    open_training(configured(held), CPU, 0, 1)


def test_free_memory_is_between_nothing_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory_module._free_bytes(CPU)
    assert 2**20 < alone < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_module._free_bytes(CPU) == pytest.approx(alone / 4, rel=0.2)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch job's limit lies on a group around the process's; a container's on the outermost."""
    left_by_groups = partial(memory_module._left_by_groups, tmp_path)
    assert list(left_by_groups()) == []  # not Linux
    monkeypatch.setattr(memory_module, "_left_by_groups", left_by_groups)
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    top = tmp_path / "sys/fs/cgroup" / ("memory" * (version == 1))
    cache = "total_" * (version == 1)
    for folder, limit in ((top, "max"), (top / "job", "9000"), (top / "job/task", 2**63)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, 7000), strict=True):
            (folder / f"memory.{name}").write_text(f"{value}\n")
        (folder / "memory.stat").write_text(
            f"anon 1\n{cache}inactive_file 300\n{cache}active_file 40"
        )
    own = tmp_path / "proc/self/cgroup"
    own.parent.mkdir(parents=True)
    line = "4:memory:/job/task\n" if version == 1 else "0::/job/task\n"
    own.write_text(f"9:name=systemd:/job\n{line}1:cpu:/\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_module._free_bytes(CPU) == (9000 - 7000 + 300 + 40) / 2
    own.write_text(line.replace("/job/task", "/of/the/host"))  # as a container without a namespace
    assert memory_module._free_bytes(CPU) > 9000
    (top / f"memory.{names[0]}").write_text("8000")
    assert memory_module._free_bytes(CPU) == (8000 - 7000 + 300 + 40) / 2


def test_a_bad_file_is_an_error_where_the_policy_says_so(held: Settings, damaged: Path) -> None:
    settings = configured(held, root=str(damaged), bad_images={"policy": "raise"})
    with pytest.raises(DataError, match=r"cannot read image .*cat/3\.png"):
        open_training(settings, CPU, 0, 1)


@pytest.fixture
def measured(tool: Callable[..., None], tmp_path: Path, capsys: Any) -> Callable[..., list[str]]:
    """``kw benchmark loading`` of so many images, and the lines that it prints."""

    def lines(settings: Settings, images: int) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        threads = torch.get_num_threads()
        tool("kw benchmark loading", path, "--images", images)
        torch.set_num_threads(threads)
        return capsys.readouterr().out.splitlines()

    return lines


def test_loading_is_measured(settings: Settings, measured: Callable[..., list[str]]) -> None:
    lines = measured(settings, 80)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "files",
        "memory of the device",
        "memory of the host",
    ]
    assert all(float(line.split("|")[3].replace(",", "")) > 0 for line in lines[2:])


def test_loading_from_files_is_told_though_memory_refuses(
    settings: Settings, unequal: Path, measured: Callable[..., list[str]]
) -> None:
    settings["data"]["root"] = str(unequal)
    lines = measured(settings, 32)
    assert [line.split("|")[1].strip() for line in lines[2:3]] == ["files"]
    assert [line.split(": ")[0] for line in lines[3:]] == [
        "memory of the device",
        "memory of the host",
    ]
    assert all("images have different sizes" in line for line in lines[3:])
