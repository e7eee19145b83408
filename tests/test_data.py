"""kw.data: what is read, in which order, and what becomes of it, on small generated images."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from kw.config.data_schema import DataConfig
from kw.data import (
    DataError,
    EvalBatchSampler,
    ImageFolder,
    TrainBatchSampler,
    build_loader,
    build_transform,
    derive_seed,
    list_splits,
    seeded,
)
from kw.data.transforms import _posterize

CLASSES = ("ant", "bee", "cat")
SIZE = 16


def check_data_root(
    root: Path, num_classes: int, splits: Sequence[str] = ("train", "val")
) -> Sequence[str]:
    return list_splits(DataConfig(root=str(root)), num_classes, splits)[splits[0]].classes


def make_config(**settings: Any) -> DataConfig:
    return DataConfig(root="unused", **({"input_size": SIZE} | settings))


def augmenting(**settings: Any) -> DataConfig:
    return make_config(auto_augment="rand-m9-mstd0.5-inc1", **settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 3 classes with 21 training and 11 test images of noise."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.RandomState(0)
    for split, count in (("train", 21), ("val", 11)):
        for number in range(count):
            path = folder / split / CLASSES[number % 3] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.randint(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        (folder / split / ".cache").mkdir()
        (folder / split / "ant" / "._00.png").write_bytes(b"not an image")
        (folder / split / "ant" / "notes.txt").touch()
    return folder


# --- seeding ---------------------------------------------------------------------------------


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_depends_on_the_key() -> None:
    with seeded("a", 1, 2):
        first = draw()
    with seeded("a", 1, 2):
        assert draw() == first
    with seeded("a", 1, 3):
        assert draw() != first


def test_seeded_restores_all_three_generators() -> None:
    def start() -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    start()
    expected = draw(), draw()
    start()
    before = draw()
    with suppress(KeyError), seeded("a", 1, 2):
        draw()
        raise KeyError
    assert (before, draw()) == expected


def test_seeds_of_different_keys_differ() -> None:
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (2**32,), ("a", 1), ("b", 1), ("a1",), (-1,)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(np.int64(3)) == derive_seed(3)
    # Fixed for good: a resumed run may have been started with another release.
    assert derive_seed("image", 0, 1, 2) == 5140520272727334215


# --- samplers --------------------------------------------------------------------------------


def indices_of_update(
    update: int, batch_size: int, world_size: int, epoch: int = 1, size: int = 70
) -> list[int]:
    """The images of one update of 16, concatenated by micro-batch, then by process."""
    samplers = [
        TrainBatchSampler(size, batch_size, 16, rank, world_size, seed=5)
        for rank in range(world_size)
    ]
    batches = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    accumulation = samplers[0].accumulation
    rows = range(update * accumulation, (update + 1) * accumulation)
    keys = [key for row in rows for rank in range(world_size) for key in batches[rank][row]]
    assert {key[0] for key in keys} == {epoch}
    return [index for _, index in keys]


@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 2), (8, 1), (4, 2), (2, 8), (1, 4)])
def test_an_update_has_the_same_images_on_any_number_of_processes(
    batch_size: int, world_size: int
) -> None:
    for update in range(4):
        assert indices_of_update(update, batch_size, world_size) == indices_of_update(update, 16, 1)


def test_an_epoch_is_a_permutation_without_its_incomplete_update() -> None:
    sampler = TrainBatchSampler(70, 8, 16, seed=5)
    assert (sampler.updates_per_epoch, sampler.accumulation, len(sampler)) == (4, 2, 8)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len(batch) == 8 for batch in batches)
    seen = [index for batch in batches for _, index in batch]
    assert len(set(seen)) == 64
    assert set(seen) <= set(range(70))
    assert list(sampler) == batches
    sampler.set_epoch(1)
    assert [index for batch in sampler for _, index in batch] != seen
    assert list(TrainBatchSampler(70, 8, 16, seed=6)) != batches


def test_training_resumes_inside_an_epoch() -> None:
    sampler = TrainBatchSampler(70, 4, 16, rank=1, world_size=2)
    sampler.set_epoch(3)
    whole = list(sampler)
    for update in range(5):
        sampler.set_epoch(3, start_update=update)
        assert list(sampler) == whole[update * sampler.accumulation :]
    with pytest.raises(ValueError, match="start at update 5: an epoch has 4"):
        sampler.set_epoch(3, start_update=5)


@pytest.mark.parametrize("size", [1, 7, 11, 16, 17])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_reads_every_image_once(size: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        sampler = EvalBatchSampler(size, 4, rank, world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= 4 for batch in batches)
        seen += [key for batch in batches for key in batch]
    assert sorted(seen) == [(0, index) for index in range(size)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 16, 100, 0, 2), "total_batch_size 100 .* batch_size 16 x 2 .* 96 and 128"),
        ((1000, 64, 32), "total_batch_size 32 .* nearest that are: 64"),
        ((100, 16, 256), "100 images.*total_batch_size 256; set total_batch_size to 96 or less"),
        ((100, 128, 128), "100 images.*set batch_size to at most 100"),
        ((100, 8, 16, 2, 2), "rank 2 is outside 0 to 1"),
    ],
)
def test_impossible_batches_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainBatchSampler(*arguments)


# --- dataset and its checks ------------------------------------------------------------------


def test_folder_is_listed_by_class_and_name(root: Path) -> None:
    dataset = ImageFolder(root, "val", build_transform(make_config(), training=False))
    assert dataset.classes == list(CLASSES)
    assert len(dataset) == 11
    assert dataset.path(0) == root / "val" / "ant" / "00.png"
    assert dataset.path(10) == root / "val" / "cat" / "08.png"
    image, label, key = dataset[0, 10]
    assert (image.shape, image.dtype, label, key) == ((3, SIZE, SIZE), torch.uint8, 2, (0, 10))
    assert check_data_root(root, 3) == list(CLASSES)


def test_augmentation_is_a_function_of_seed_epoch_and_index(root: Path) -> None:
    transform = build_transform(augmenting(), training=True)
    dataset = ImageFolder(root, "train", transform, seed=1)
    copy = pickle.loads(pickle.dumps(dataset))
    torch.manual_seed(3)
    image = dataset[2, 5].image
    assert torch.equal(image, copy[2, 5].image)
    assert not torch.equal(image, dataset[3, 5].image)
    assert not torch.equal(image, ImageFolder(root, "train", transform, seed=2)[2, 5].image)


def test_unreadable_image_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train" / "ant" / "broken.jpg").write_bytes(b"no image")
    dataset = ImageFolder(tmp_path, "train", build_transform(make_config(), training=False))
    with pytest.raises(DataError, match=r"cannot read image .*broken\.jpg"):
        dataset[0, 0]


def test_misshapen_folders_are_described(root: Path, tmp_path: Path) -> None:
    image = next((root / "val" / "ant").glob("0*.png")).read_bytes()

    def put(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)

    def refused(*parts: str, num_classes: int = 2) -> None:
        with pytest.raises(DataError) as error:
            check_data_root(tmp_path, num_classes)
        for part in parts:
            assert part in str(error.value)

    with pytest.raises(DataError, match="nowhere does not exist; expected train/ and val/"):
        check_data_root(tmp_path / "nowhere", 2)
    put("file")
    with pytest.raises(DataError, match="file is not a folder"):
        check_data_root(tmp_path / "file", 2)
    refused("has no train/; expected train/ and val/", f"{tmp_path} holds file")
    put("train/0.png", "train/1.JPEG")
    refused("train has no class folders", "holds 0.png, 1.JPEG, 2 of them images")
    (tmp_path / "train" / "ant").mkdir()
    refused("1 of 1 class folders", "have no image: ant", "*.jpeg", "ant is empty")
    put("train/ant/0.txt")
    refused("have no image: ant", "ant holds 0.txt")
    with pytest.raises(DataError, match="have no image: ant"):
        ImageFolder(tmp_path, "train", build_transform(make_config(), training=False))
    put("train/ant/deeper/0.png", "train/bee/0.png")
    refused("has no val/", "holds file, train/")
    put("val/ant/0.png", "val/cow/0.png")
    refused("val must have the classes of", "lacks bee and has besides cow")
    (tmp_path / "val" / "cow").rename(tmp_path / "val" / "bee")
    for num_classes in (1, 1000):
        refused(
            "has 2 classes (ant, bee)",
            f"model.num_classes is {num_classes}: set model.num_classes to 2",
            num_classes=num_classes,
        )
    assert check_data_root(tmp_path, 2) == ["ant", "bee"]
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert check_data_root(tmp_path, 2, splits=["val"]) == ["ant", "bee"]


def test_one_class_teaches_nothing(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "ant" / "0.png")
    with pytest.raises(DataError, match=r"has one class \(ant\): there is nothing to tell apart"):
        check_data_root(tmp_path, 1)
    assert check_data_root(tmp_path, 1, splits=["val"]) == ["ant"]


# --- transforms ------------------------------------------------------------------------------

MODES = ("RGB", "L", "P", "CMYK", "RGBA", "1", "LA")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (1, 1), (2, 50)])
def test_any_image_comes_out_square(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = tmp_path / "ant" / "image.tiff"
    path.parent.mkdir()
    Image.fromarray(noise).convert(mode).save(path)
    for training in (True, False):
        transform = build_transform(augmenting(color_jitter=0.4), training)
        image = ImageFolder(tmp_path.parent, tmp_path.name, transform)[0, 0].image
        assert image.dtype == torch.uint8
        assert image.shape == (3, SIZE, SIZE)


def test_test_images_are_resized_by_the_shorter_side_and_cropped_centrally() -> None:
    # A ramp along the longer side: 224 / 0.875 = 256 is the resized height, as the image has it.
    ramp = np.broadcast_to(np.arange(300) % 256, (256, 300)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    out = build_transform(make_config(input_size=224), training=False)(image)
    assert torch.equal(out[0, 0], torch.from_numpy(ramp[0, 38 : 38 + 224].copy()))
    for ratio, resized in ((0.9, 17), (1.0, 16), (0.95, 16)):
        transform = build_transform(make_config(test_crop_ratio=ratio), training=False)
        assert transform.transforms[0].resize.size == resized  # type: ignore[attr-defined]


def test_training_transform_follows_the_configuration() -> None:
    def steps(**settings: Any) -> str:
        return repr(build_transform(make_config(**settings), training=True))

    plain = steps(horizontal_flip=0.0, crop_scale=[0.2, 0.9], interpolation="bilinear")
    assert "scale=(0.2, 0.9), ratio=(0.75, 1.3333), interpolation=bilinear" in plain
    assert "Flip" not in plain
    assert "Jitter" not in plain
    assert "Flip" in steps()
    assert "ColorJitter" in steps(color_jitter=0.4)
    assert "ColorJitter" not in steps(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1")
    assert "ColorJitter" in steps(color_jitter=0.4, auto_augment="3a")


@pytest.mark.parametrize(
    "policy",
    ["rand-m10-n100-p1-inc1", "rand-m1-n100-p1", "augmix-m10-w9-d9", "v0", "v0r", "original", "3a"],
)
def test_policies_run_with_the_installed_pillow(policy: str) -> None:
    # At the ends of their strength timm's operations ask Pillow for what it no longer does.
    image = Image.effect_noise((24, 20), 50).convert("RGB")
    transform = build_transform(make_config(auto_augment=policy), training=True)
    for number in range(30):
        with seeded(policy, number):
            assert transform(image).shape == (3, SIZE, SIZE)


def test_posterizing_to_no_bits_is_black() -> None:
    image = Image.new("RGB", (3, 3), (200, 100, 255))
    assert _posterize(image, 0, fillcolor=0).getextrema() == ((0, 0), (0, 0), (0, 0))
    assert _posterize(image, 1).getpixel((0, 0)) == (128, 0, 128)
    assert _posterize(image, 8) is image


# --- loaders ---------------------------------------------------------------------------------


def epochs_of(root: Path, workers: int) -> Iterator[dict[str, Any]]:
    dataset = ImageFolder(root, "train", build_transform(augmenting(), training=True), seed=1)
    loader = build_loader(dataset, TrainBatchSampler(len(dataset), 4, 8, seed=1), workers)
    for epoch, start_update in ((0, 0), (1, 0), (2, 1)):
        loader.batch_sampler.set_epoch(epoch, start_update)  # type: ignore[union-attr]
        for batch in loader:
            assert batch["key"][0] == epoch
            yield batch


def test_batches_do_not_depend_on_the_number_of_workers(root: Path) -> None:
    state = torch.get_rng_state()
    alone, helped = list(epochs_of(root, 0)), list(epochs_of(root, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert len(alone) == len(helped) == 4 + 4 + 2
    for left, right in zip(alone, helped, strict=True):
        assert left["key"] == right["key"]
        for name in ("images", "labels", "indices"):
            assert torch.equal(left[name], right[name])
    assert alone[0]["images"].shape == (4, 3, SIZE, SIZE)
    assert alone[0]["images"].dtype == torch.uint8
    assert alone[0]["labels"].dtype == alone[0]["indices"].dtype == torch.int64


def test_batch_holds_each_image_in_its_place(root: Path) -> None:
    dataset = ImageFolder(root, "val", build_transform(make_config(), training=False))
    for rank in range(2):
        loader = build_loader(dataset, EvalBatchSampler(len(dataset), 3, rank, 2), workers=0)
        for batch in loader:
            for row, index in enumerate(batch["indices"].tolist()):
                assert torch.equal(batch["images"][row], dataset[0, index].image)
                assert batch["labels"][row] == dataset.labels[index]


# --- the demo's data -------------------------------------------------------------------------


def test_digits_are_written_once_and_nothing_else_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from kw.data.digits import main

    target = tmp_path / "digits"
    assert main([str(target)]) == 0
    line = capsys.readouterr().out
    assert "1438 training and 359 test images of 10 classes, 32x32" in line
    assert str(target) in line
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert check_data_root(target, 10) == [str(digit) for digit in range(10)]
    dataset = ImageFolder(target, "val", build_transform(make_config(), training=False))
    assert np.bincount(dataset.labels).min() >= 34
    with Image.open(dataset.path(0)) as image:
        assert image.size == (32, 32)
        assert image.mode == "L"
        assert np.asarray(image).min() == 0
        assert np.asarray(image).max() > 200

    written = dataset.path(0).stat().st_mtime_ns
    assert main([str(target)]) == 0
    assert dataset.path(0).stat().st_mtime_ns == written
    capsys.readouterr()

    def refused(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    assert "has the digits with" in refused(str(target), "--size", "16")
    dataset.path(0).unlink()
    assert "found 1438 in train/ and 358 in val/" in refused(str(target))
    assert "was not written by this program" in refused(str(tmp_path))


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kw.data.digits import write_digits

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"kernelwarehouse\[demo\]"):
        write_digits(tmp_path / "digits")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(2000, 30), (30, 2000), (9000, 500), (3, 901), (40, 333)])
def test_long_pictures_are_tested_as_if_they_were_resized_whole(
    size: tuple[int, int], interpolation: str
) -> None:
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    config = DataConfig(root="x", input_size=32, interpolation=interpolation)
    found = build_transform(config, False)(image)
    whole = create_transform(
        32, interpolation=interpolation, crop_pct=config.test_crop_ratio, normalize=False
    )(image)
    difference = (found.int() - whole.int()).abs()
    assert difference.max() <= (0 if max(size) < 8 * min(size) else 1)


def test_a_very_long_picture_takes_little_memory() -> None:
    """2 x 60,000 pixels: whole, 256 pixels wide, they would be 5.9 GB."""
    made: list[int] = []
    image = Image.new("RGB", (2, 60_000))
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", noted)
        transform = build_transform(DataConfig(root="x", input_size=224), False)
        assert transform(image).shape == (3, 224, 224)
    assert max(made) < 10**6
