"""Repeated augmentation and balanced sampling: which images an update has, and what is drawn."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breadth import breadth

from kw.config import ConfigError, config_from_mapping
from kw.data import Loader, TrainBatchSampler, derive_seed, open_training
from kw.data.samplers import Key
from kw.training import load_checkpoint, train

CPU = torch.device("cpu")
Settings = dict[str, Any]
UNEVEN = np.repeat([0, 1, 2, 4], [5, 20, 60, 300])  # class 3 has no images


def updates(batch_size: int, world_size: int, epoch: int = 1, **more: Any) -> list[list[list[Key]]]:
    """The micro-batches of each update of 24 among 385 images, over all processes."""
    found: list[list[list[Key]]] = []
    for rank in range(world_size):
        sampler = TrainBatchSampler(len(UNEVEN), batch_size, 24, rank, world_size, 5, **more)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 16 * sampler.accumulation
        found = found or [[] for _ in range(sampler.updates_per_epoch)]
        for place, batch in enumerate(batches):
            found[place // sampler.accumulation].append(batch)
    return found


def keys_of(update: list[list[Key]]) -> list[Key]:
    return sorted(key for batch in update for key in batch)


@pytest.mark.parametrize(
    "more", [{"repeats": 3}, {"labels": UNEVEN}, {"repeats": 2, "labels": UNEVEN}]
)
@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 3), (4, 2), (24, 1), (3, 1)])
def test_an_update_does_not_depend_on_processes(
    batch_size: int, world_size: int, more: dict[str, Any]
) -> None:
    whole, dealt = updates(12, 1, **more), updates(batch_size, world_size, **more)
    assert list(map(keys_of, whole)) == list(map(keys_of, dealt))
    keys = [key for update in whole for key in keys_of(update)]
    assert len(set(keys)) == 16 * 24  # no two draws of an epoch are augmented alike
    assert {key[0] for key in keys} == {1}
    assert sorted(key[2] for key in keys) == list(range(16 * 24))


def test_every_image_of_an_update_is_repeated() -> None:
    for repeats in (2, 3, 24):
        seen: Counter[int] = Counter()
        for update in updates(8, 1, repeats=repeats):
            counts = Counter(index for batch in update for _, index, _ in batch)
            assert set(counts.values()) == {repeats}
            seen += counts
        assert len(seen) == 16 * 24 / repeats  # nothing again before the epoch's end
    # Ten times: an image's copies may go on in the next update.
    every = Counter(key[1] for update in updates(8, 1, repeats=10) for key in keys_of(update))
    assert sorted(every.values()) == [4] + 38 * [10]


def test_without_repeats_keys_are_as_they_were() -> None:
    """Augmentation is drawn from the key: a longer one would change every earlier run."""
    sampler = TrainBatchSampler(70, 8, 16, seed=5)
    generator = torch.Generator().manual_seed(derive_seed("permutation", 5, 0))
    order = torch.randperm(70, generator=generator).tolist()
    assert [key for batch in sampler for key in batch] == [(0, index) for index in order[:64]]


def test_copies_are_dealt_out_as_deits() -> None:
    """RASampler: images three times in a row, of which process r takes r, r + W, r + 2W, ..."""
    plain = TrainBatchSampler(len(UNEVEN), 6, 24, seed=5)
    plain.set_epoch(1)
    order = [index for batch in plain for _, index in batch]
    repeated = np.repeat(order, 3)[: 16 * 24]
    for rank in range(4):
        sampler = TrainBatchSampler(len(UNEVEN), 6, 24, rank, 4, 5, repeats=3)
        sampler.set_epoch(1)
        dealt = [index for batch in sampler for _, index, _ in batch]
        assert dealt == repeated[rank::4].tolist()
    for update in updates(6, 2, repeats=3):
        for batch in update:
            assert len({index for _, index, _ in batch}) == len(batch)


def test_groups_are_kept_with_repeats() -> None:
    groups = [index % 2 for index in range(len(UNEVEN))]
    for update in updates(8, 3, repeats=2, groups=groups):
        mixed = [batch for batch in update if len({key[1] % 2 for key in batch}) > 1]
        assert len(mixed) <= 1
        assert set(Counter(key[1] for key in keys_of(update)).values()) == {2}


def test_classes_are_equally_likely() -> None:
    """Four classes of 5 to 300 images: within five standard deviations of a quarter each, and the
    images of a class alike."""
    drawn: Counter[int] = Counter()
    for epoch in range(40):
        drawn += Counter(
            key[1] for update in updates(24, 1, epoch, labels=UNEVEN) for key in keys_of(update)
        )
    count = drawn.total()
    assert count == 40 * 16 * 24
    for label in (0, 1, 2, 4):
        images = np.flatnonzero(label == UNEVEN)
        hits = np.array([drawn[int(index)] for index in images])
        assert abs(hits.sum() - count / 4) < 5 * (count * 3 / 16) ** 0.5
        expected = count / 4 / len(images)
        assert (abs(hits - expected) < 5 * expected**0.5).all()
    assert updates(24, 1, 0, labels=UNEVEN) != updates(24, 1, 1, labels=UNEVEN)


@pytest.mark.parametrize("more", [{"repeats": 5}, {"labels": UNEVEN}])
def test_resuming_inside_an_epoch(more: dict[str, Any]) -> None:
    sampler = TrainBatchSampler(len(UNEVEN), 4, 24, 1, 2, **more)
    sampler.set_epoch(3)
    whole = list(sampler)
    for update in (1, 15, 16):
        sampler.set_epoch(3, update)
        assert list(sampler) == whole[3 * update :]


def test_several_classes_an_image_cannot_be_balanced() -> None:
    with pytest.raises(ConfigError, match=r"set data\.sampling to shuffle"):
        TrainBatchSampler(3, 1, 1, labels=np.eye(3, dtype=np.uint8))


# --- loaders and runs ------------------------------------------------------------------------


def loader_of(settings: Settings, rank: int = 0, world_size: int = 1, **data: Any) -> Loader:
    config = config_from_mapping(
        {**settings, "data": {**settings["data"], **data}}, check_model_name=False
    )
    return open_training(config, CPU, rank, world_size)


def images_of(loaders: list[Loader], epoch: int = 0) -> list[list[bytes]]:
    """The images of each update, in the order of their bytes."""
    found: list[list[bytes]] = []
    for loader in loaders:
        sampler: Any = loader.batch_sampler
        sampler.set_epoch(epoch)
        batches = [batch["images"] for batch in loader]
        found = found or [[] for _ in range(sampler.updates_per_epoch)]
        for place, images in enumerate(batches):
            found[place // sampler.accumulation] += [each.numpy().tobytes() for each in images]
    return [sorted(update) for update in found]


@pytest.mark.parametrize("memory", [None, {"place": "host"}])
def test_each_copy_is_augmented_anew(settings: Settings, memory: Any) -> None:
    """And alike on any number of processes."""
    settings["data"] |= {"repeats": 4, "memory": memory, "color_jitter": 0.4}
    whole = images_of([loader_of(settings)])
    assert [len(set(update)) for update in whole] == [16] * 4
    settings["batch_size"] = 4
    assert images_of([loader_of(settings, rank, 2) for rank in range(2)]) == whole
    assert images_of([loader_of(settings)], epoch=1) != whole
    # Without repeats an image is drawn as ever: from (seed, epoch, index).
    once = loader_of(settings, repeats=1)
    batch = next(iter(once))
    assert batch["key"] == (0, batch["indices"][0])


@pytest.mark.parametrize("memory", [None, {"place": "host"}])
def test_copies_of_a_bad_file_are_replaced(settings: Settings, tmp_path: Path, memory: Any) -> None:
    root = tmp_path / "images"
    shutil.copytree(settings["data"]["root"], root)
    (root / "train/cat/3.png").write_bytes(b"no image")
    bad = 16 + sorted(str(i) for i in range(16)).index("3")
    settings["data"] |= {"root": str(root), "repeats": 16, "memory": memory}
    settings["data"]["bad_images"] = {"max_fraction": 0.1}
    loader = loader_of(settings)
    sampler: Any = loader.batch_sampler
    for epoch in range(64):
        sampler.set_epoch(epoch)
        update = next((i for i, batch in enumerate(sampler) if batch[0][1] == bad), None)
        if update is not None:
            break
    assert update is not None
    batch = list(loader)[update]
    assert batch["indices"].tolist() == [bad] * 16
    assert len(set(batch["labels"].tolist())) > 1  # each copy has a substitute of its own
    settings["batch_size"] = 8
    labels = []
    for rank in range(2):
        share = loader_of(settings, rank, 2)
        share.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        labels += list(share)[update]["labels"].tolist()
    assert sorted(labels) == sorted(batch["labels"].tolist())


SAMPLED = [{"repeats": 2, "mixup": 0.8}, {"sampling": "balanced"}]


@pytest.mark.parametrize("data", breadth(SAMPLED, SAMPLED[:1]))
def test_a_resumed_run_is_the_same_to_the_bit(
    settings: Settings, tmp_path: Path, data: dict[str, Any]
) -> None:
    settings["data"] |= data
    settings |= {"batch_size": 8, "checkpoint": {"updates": 3, "keep": 9}}
    train(config_from_mapping(settings), tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole/epoch_0_update_3.pth", tmp_path / "cut")
    metrics = train(config_from_mapping(settings), tmp_path / "cut", resume=True)
    assert metrics["images"] == 19  # every test image once, whatever training repeats
    whole, cut = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "cut"))
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name
