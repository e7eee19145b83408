"""kw.data's preprocessing of a batch on the device, against hand computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kw.config.data_schema import DataConfig, RandomErasingConfig
from kw.data import BatchPreprocessor

SIZE = 16


def make_config(**settings: Any) -> DataConfig:
    return DataConfig(root="unused", **({"input_size": SIZE} | settings))


def make_batch(size: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(256, (size, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(10, (size,), generator=generator),
        "indices": torch.arange(size),
        "key": (0, 0),
        "keys": [(0, index) for index in range(size)],
    }


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("source_last", [False, True])
def test_images_are_normalised(channels_last: bool, source_last: bool) -> None:
    config, batch = make_config(), make_batch()
    if source_last:
        batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
    original = batch["images"].clone()
    preprocess = BatchPreprocessor(config, 10, channels_last=channels_last)
    for training in (True, False):
        images, labels = preprocess(batch, training)
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        expected = (original / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=layout)
        assert torch.equal(labels, batch["labels"])
    assert torch.equal(batch["images"], original)
    assert not preprocess.state_dict()


def test_smoothed_targets_give_the_smoothed_loss() -> None:
    batch, logits = make_batch(6), torch.randn(6, 10)
    preprocess = BatchPreprocessor(make_config(), 10, label_smoothing=0.1)
    _, targets = preprocess(batch, training=True)
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)
    assert preprocess(batch, training=False)[1].dtype == torch.int64


def test_mixup_is_the_weighted_sum_of_an_image_and_its_mirror_in_the_batch() -> None:
    config, batch = make_config(mixup=0.8), make_batch(4)
    clean, _ = BatchPreprocessor(config, 10)(batch, training=False)
    images, targets = BatchPreprocessor(config, 10, label_smoothing=0.1)(batch, training=True)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    # The share follows from the images, and the targets must agree with it.
    share = ((images - clean.flip(0)) / (clean - clean.flip(0))).nanmedian()
    assert 0 < share < 1
    torch.testing.assert_close(images, share * clean + (1 - share) * clean.flip(0))
    smoothed = F.one_hot(batch["labels"], 10) * 0.9 + 0.01
    torch.testing.assert_close(targets, share * smoothed + (1 - share) * smoothed.flip(0))


def test_cutmix_share_is_the_area_kept() -> None:
    batch = make_batch(2)
    batch["labels"] = torch.tensor([3, 7])
    config = make_config(cutmix=1.0)
    clean, _ = BatchPreprocessor(config, 10)(batch, training=False)
    images, targets = BatchPreprocessor(config, 10)({**batch, "key": (4,)}, training=True)
    kept = (images[0] == clean[0]).all(dim=0)
    assert torch.equal(images[0][:, ~kept], clean[1][:, ~kept])
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(targets[0, 3], kept.float().mean())
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_changes_a_rectangle(mode: str) -> None:
    config = make_config(random_erasing=RandomErasingConfig(probability=1.0, mode=mode))
    batch = make_batch(8)
    clean, _ = BatchPreprocessor(config, 10)(batch, training=False)
    images, labels = BatchPreprocessor(config, 10)(batch, training=True)
    assert torch.equal(labels, batch["labels"])
    for erased in (images != clean).any(dim=1):
        rows, columns = erased.any(dim=1), erased.any(dim=0)
        assert 0 < erased.sum() == rows.sum() * columns.sum() < SIZE * SIZE


def all_augmentations() -> DataConfig:
    return make_config(
        auto_augment="rand-m9-mstd0.5-inc1",
        augment_on="device",
        random_erasing=RandomErasingConfig(),
        mixup=0.8,
        cutmix=1.0,
    )


def test_random_choices_depend_on_seed_and_key_alone() -> None:
    batch = make_batch(8)
    preprocess = BatchPreprocessor(all_augmentations(), 10, 0.1, seed=1)

    def run(key: tuple[int, ...] = batch["key"], seed: int = 1) -> torch.Tensor:
        torch.rand(3)
        other = BatchPreprocessor(all_augmentations(), 10, 0.1, seed=seed)
        return (preprocess if seed == 1 else other)({**batch, "key": key}, training=True)[1]

    assert torch.equal(run((1, 2)), run((1, 2)))
    assert not torch.equal(run((1, 2)), run((1, 3)))
    assert not torch.equal(run((1, 2)), run((1, 2), seed=2))
    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(key=(1, 0)))
    assert not torch.equal(run(), run(key=(0, 5)))
    state = torch.get_rng_state()
    preprocess(batch, training=True)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_waits_for_the_device() -> None:
    # A tensor on the meta device has no values: reading one on the host would raise.
    batch = make_batch(8)
    batch |= {name: batch[name].to("meta") for name in ("images", "labels")}
    preprocess = BatchPreprocessor(all_augmentations(), 10, 0.1, channels_last=True).to("meta")
    for step in range(20):
        images, targets = preprocess({**batch, "key": (step,)}, training=True)
    assert images.is_meta
    assert images.shape == (8, 3, SIZE, SIZE)
    assert targets.shape == (8, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_is_waited_for_and_choices_depend_on_the_key() -> None:
    batch = make_batch(8)
    batch["images"], batch["labels"] = batch["images"].pin_memory(), batch["labels"].pin_memory()
    preprocess = BatchPreprocessor(all_augmentations(), 10, 0.1).cuda()
    preprocess(batch, training=True)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = preprocess({**batch, "key": (1,)}, training=True)
        torch.randn(3, device="cuda")
        second = preprocess({**batch, "key": (1,)}, training=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(state, torch.cuda.get_rng_state())
    state = torch.cuda.get_rng_state()
    preprocess({**batch, "key": (1,)}, training=True)
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_mixing_an_odd_batch_is_refused() -> None:
    preprocess = BatchPreprocessor(make_config(mixup=0.8), 10)
    with pytest.raises(ValueError, match="batch_size is 5, expected an even number"):
        preprocess(make_batch(5), training=True)
