"""Policies on batches of tensors: what is drawn, against timm; batches and runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from policies import RAND, configured, from_pillow, names, pictures, timms_steps, to_pillow
from timm.data import auto_augment as timm_policies
from torchvision.transforms import ColorJitter

from kw.config import ConfigError, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.config.schema import Config
from kw.data import BatchPreprocessor, derive_seed, open_training, seeded
from kw.data.policies import BatchPolicy, Step
from kw.data.transforms import build_fast_transform, policy_operations, training_steps
from kw.training import load_checkpoint, train

CPU = torch.device("cpu")
Settings = dict[str, Any]

# --- what is drawn ---------------------------------------------------------------------------

DRAWS = 12_000


def timms_draws(config: DataConfig) -> list[list[Step]]:
    """What timm calls, in its own loop, with its own generators."""
    (policy,) = training_steps(config)[1]
    calls: list[Step] = []
    for op in policy_operations([policy]):

        def note(image: Any, *values: float, _name: str = op.aug_fn.__name__, **_: Any) -> Any:
            value = values[0] if values else 0.0
            if _name == "gaussian_blur_rand":
                value = random.uniform(0.1, 2.0 * value)
            calls.append(Step(_name, value))
            return image

        op.aug_fn = note
    found = []
    with seeded("timm's draws"):
        for _ in range(DRAWS):
            calls.clear()
            policy(None)
            found.append(list(calls))
    return found


def chi_square(one: Iterable[Any], other: Iterable[Any]) -> tuple[float, int]:
    """Of two samples of equal size, and the degrees of freedom; rare values count as one."""
    counts = Counter(one), Counter(other)
    pairs = [(counts[0][value], counts[1][value]) for value in {*counts[0], *counts[1]}]
    common = [pair for pair in pairs if sum(pair) >= 10]
    rare = [pair for pair in pairs if sum(pair) < 10]
    cells = [*common, *([tuple(map(sum, zip(*rare, strict=True)))] if rare else [])]
    return sum((a - b) ** 2 / (a + b) for a, b in cells), len(cells) - 1


def kolmogorov(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest distance of two samples' distribution functions, in units in which it exceeds
    1.95 in one case of a thousand where the distributions are equal."""
    x, y = np.sort(one), np.sort(other)
    at = np.concatenate([x, y])
    gap = np.searchsorted(x, at, "right") / len(x) - np.searchsorted(y, at, "right") / len(y)
    return float(np.abs(gap).max() * np.sqrt(len(x) * len(y) / (len(x) + len(y))))


@pytest.mark.parametrize(
    "policy",
    [
        RAND,
        "rand-m9-n3-p0.8",
        "rand-m7-mstd101-inc1",  # strengths from 0 to 7
        "rand-m14-mmax20-mstd3-n1-p1",
        "rand-m9-n4-mstd1-p1-tweights",
        "rand-m9-mstd0.5-t3aw",
        "v0-mstd1",
        "original-mstd0.5",
        "3a",
    ],
)
def test_draws_are_distributed_as_timms(policy: str) -> None:
    """Which operations in which order, and each one's strengths and signs."""
    config = configured(policy)
    ours = BatchPolicy(config).choose([derive_seed(policy, i) for i in range(DRAWS)])
    theirs = timms_draws(config)
    found, freedom = chi_square(*(map(names, draws) for draws in (ours, theirs)))
    assert freedom >= 2
    assert found < freedom + 4 * (2 * freedom) ** 0.5
    values = [
        {name: [s.value for steps in draws for s in steps if s.name == name] for name in everything}
        for draws in (ours, theirs)
        for everything in [{step.name for steps in theirs for step in steps}]
    ]
    for name, expected in values[1].items():
        assert kolmogorov(values[0][name], expected) < 1.95, name


def test_another_distribution_would_be_noticed() -> None:
    """Strengths and frequencies that differ by a little fail the bounds above."""
    config = configured()
    theirs = timms_draws(config)
    seeds = [derive_seed(RAND, i) for i in range(DRAWS)]
    weaker = BatchPolicy(configured("rand-m8-mstd0.5-inc1")).choose(seeds)
    rarer = BatchPolicy(configured("rand-m9-mstd0.5-inc1-p0.45")).choose(seeds)
    shears = [[s.value for x in d for s in x if s.name == "shear_x"] for d in (weaker, theirs)]
    assert kolmogorov(*shears) > 1.95
    found, freedom = chi_square(map(names, rarer), map(names, theirs))
    assert found > freedom + 4 * (2 * freedom) ** 0.5


def test_colour_jitter_is_drawn_as_torchvisions() -> None:
    jitter = ColorJitter(0.4, 0.4, 0.4)
    words = ("brightness", "contrast", "color")
    orders, factors = [], []
    with seeded("torchvision's draws"):
        for _ in range(DRAWS):
            order, *drawn = ColorJitter.get_params(
                jitter.brightness, jitter.contrast, jitter.saturation, None
            )
            orders.append(tuple(words[i] for i in order.tolist() if i < 3))
            factors.append(drawn[:3])
    policy = BatchPolicy(configured(None, color_jitter=0.4))
    ours = policy.choose([derive_seed("jitter", i) for i in range(DRAWS)])
    found, freedom = chi_square(map(names, ours), orders)
    assert freedom == 5
    assert found < freedom + 4 * (2 * freedom) ** 0.5
    for word, expected in zip(words, np.array(factors).T, strict=True):
        values = [step.value for steps in ours for step in steps if step.name == word]
        assert 0.6 <= min(values) < max(values) <= 1.4
        assert kolmogorov(values, expected) < 1.95


def test_three_augment_is_one_of_three_and_jitter() -> None:
    policy = BatchPolicy(configured("3a", color_jitter=0.3))
    chosen = policy.choose([derive_seed(i) for i in range(600)])
    kinds = Counter(steps[0].name for steps in chosen)
    assert kinds.keys() == {"solarize", "desaturate", "gaussian_blur_rand"}
    assert min(kinds.values()) > 150
    assert all(set(names(steps[1:])) == {"brightness", "contrast", "color"} for steps in chosen)
    radii = [steps[0].value for steps in chosen if steps[0].name == "gaussian_blur_rand"]
    assert 0.1 <= min(radii) < 0.2 < 1.9 < max(radii) <= 2
    grey = policy.apply(pictures(9, 9), [[Step("desaturate", 1.0)]] * 5)
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("policy", [RAND, "3a"])
def test_augmented_images_have_timms_statistics(policy: str) -> None:
    """Mean, spread and histogram of many augmented copies of one image, by pairs of standard
    errors."""
    copies, image = 3000, pictures(18, 23)[2]
    config = configured(policy, color_jitter=0.3)
    seeds = [derive_seed("statistics", i) for i in range(copies)]
    ours = BatchPolicy(config)(image.expand(copies, -1, -1, -1), seeds)
    steps, theirs = timms_steps(config), []
    with seeded("timm's images"):
        for _ in range(copies):
            pillow = to_pillow(image)
            for step in steps:
                pillow = step(pillow)
            theirs.append(from_pillow(pillow))
    one, other = (statistics(images) for images in (ours, torch.stack(theirs)))
    error = ((one.var(0) + other.var(0)) / copies).sqrt()
    off = (one.mean(0) - other.mean(0)).abs()
    assert (off <= 4 * error).all()
    # What four standard errors are: in levels, and in shares of the pixels.
    assert error[:6].max() < 1.5
    assert error[6:].max() < 0.01


def statistics(images: torch.Tensor) -> torch.Tensor:
    """Of every image: means and spreads of the channels, and a histogram of eight bins."""
    values = images.double()
    bins = [(images // 32 == i).double().mean((1, 2, 3)) for i in range(8)]
    return torch.cat([values.mean((2, 3)), values.std((2, 3)), torch.stack(bins, 1)], 1)


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [RAND, "original", "rand-m9-n3-p1-t3aw", "3a"])
def test_an_image_does_not_depend_on_its_batch(policy: str) -> None:
    images = pictures(19, 26).repeat(8, 1, 1, 1)
    seeds = [derive_seed(i) for i in range(len(images))]
    step = BatchPolicy(configured(policy, color_jitter=0.3))
    before, state = images.clone(), random.getstate()
    whole = step(images, seeds)
    assert torch.equal(images, before)
    assert random.getstate() == state
    assert not torch.equal(whole, images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = step(images[order], [seeds[i] for i in order])
    assert torch.equal(shuffled, whole[order])
    last = images[-3:].contiguous(memory_format=torch.channels_last)
    assert torch.equal(step(last, seeds[-3:]), whole[-3:])


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture(params=["files", "memory"])
def run(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """The tests' run with a policy on the device; the images from files or from memory."""
    settings["data"] |= {"auto_augment": RAND, "augment_on": "device"}
    if request.param == "memory":
        settings["data"] |= {"augment_on": "cpu", "memory": {"place": "device"}}
    return settings


def checked(settings: Settings, **data: Any) -> Config:
    return config_from_mapping(
        {**settings, "data": {**settings["data"], **data}}, check_model_name=False
    )


def prepared(config: Config, rank: int, world_size: int, start: int = 0) -> dict[int, torch.Tensor]:
    """The images of an epoch as the network gets them, by index."""
    loader = open_training(config, CPU, rank, world_size)
    preprocess = BatchPreprocessor(config.data, 4, seed=config.seed)
    sampler: Any = loader.batch_sampler
    sampler.set_epoch(1, start)
    return {
        index: image
        for batch in loader
        for index, image in zip(
            batch["indices"].tolist(), preprocess(batch, training=True)[0], strict=True
        )
    }


def test_images_do_not_depend_on_processes_workers_or_resumption(run: Settings) -> None:
    whole = prepared(checked(run), 0, 1)
    assert len(whole) == 64
    run["batch_size"] = 4
    shares: dict[int, torch.Tensor] = {}
    for rank in range(2):
        shares |= prepared(checked(run, workers=rank), rank, 2)
    assert shares.keys() == whole.keys()
    assert all(torch.equal(shares[index], whole[index]) for index in whole)
    later = prepared(checked(run), 1, 2, start=2)
    assert 0 < len(later) < 32
    assert all(torch.equal(later[index], whole[index]) for index in later)


def test_only_the_policy_moves_to_the_device(run: Settings) -> None:
    """The loader crops and mirrors as without a policy; what the policy does follows."""
    with_policy = checked(run)
    without = checked(run, auto_augment=None, augment_on="cpu")
    batches = []
    for config in (with_policy, without):
        loader = open_training(config, CPU, 0, 1)
        sampler: Any = loader.batch_sampler
        sampler.set_epoch(1)
        batches.append(next(iter(loader)))
    batch, plain = batches
    assert torch.equal(batch["images"], plain["images"])
    assert build_fast_transform(with_policy.data, True).policy is None  # type: ignore[attr-defined]
    preprocess = BatchPreprocessor(with_policy.data, 4, seed=with_policy.seed)
    images, _ = preprocess(batch, training=True)
    seeds = [
        derive_seed("policy", with_policy.seed, 1, index) for index in batch["indices"].tolist()
    ]
    augmented = {**batch, "images": BatchPolicy(with_policy.data)(batch["images"], seeds)}
    assert torch.equal(images, preprocess(augmented, training=False)[0])
    unchanged = preprocess(batch, training=False)[0]
    assert torch.equal(unchanged, BatchPreprocessor(without.data, 4)(plain, training=True)[0])
    assert not torch.equal(images, unchanged)
    keys = [(2, *key[1:]) for key in batch["keys"]]
    assert not torch.equal(images, preprocess({**batch, "keys": keys}, training=True)[0])


def test_grey_images_are_augmented_as_rgb(run: Settings) -> None:
    """Saturation and desaturation leave them alone; all else is alike in every channel."""
    grey = checked(run, channels=1, mean=[0.5], std=[0.2])
    rgb = checked(run, mean=[0.5] * 3)
    images = torch.randint(256, (32, 1, 20, 24), dtype=torch.uint8)
    seeds = list(range(32))
    found = BatchPolicy(grey.data)(images, seeds)
    expected = BatchPolicy(rgb.data)(images.expand(-1, 3, -1, -1), seeds)
    assert torch.equal(found.expand(-1, 3, -1, -1), expected)
    assert not torch.equal(found, images)


def test_copies_of_an_image_have_their_own_choices(run: Settings) -> None:
    config = checked(run, repeats=16)
    batch = next(iter(open_training(config, CPU, 0, 1)))
    assert len(set(batch["indices"].tolist())) == 1
    policy = BatchPreprocessor(config.data, 4, seed=config.seed)
    batch["images"] = batch["images"][:1].repeat(16, 1, 1, 1)
    images, _ = policy(batch, training=True)
    assert len({image.numpy().tobytes() for image in images}) > 8


def test_a_resumed_run_is_the_same_to_the_bit(run: Settings, tmp_path: Path) -> None:
    run["checkpoint"] = {"updates": 3, "keep": 9}
    train(checked(run), tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole/epoch_0_update_3.pth").rename(tmp_path / "cut/epoch_0_update_3.pth")
    train(checked(run), tmp_path / "cut", resume=True)
    whole, cut = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "cut"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"auto_augment": "augmix-m3-w3"}, r"augmix-m3-w3.: expected another policy or null besi"),
        ({"interpolation": "lanczos"}, r"data\.interpolation = .lanczos.: expected bilinear or bi"),
        ({"interpolation": "nearest"}, r"data\.interpolation = .nearest.: expected bilinear or bi"),
    ],
)
def test_what_does_not_work_on_batches_is_refused(
    run: Settings, data: Settings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(run, **data)


def test_a_filter_that_pillow_does_not_rotate_with_is_refused(run: Settings) -> None:
    in_loaders: Settings = {"augment_on": "cpu", "memory": None, "interpolation": "lanczos"}
    with pytest.raises(ConfigError, match="expected bicubic, bilinear or nearest beside data"):
        checked(run, **in_loaders)
    checked(run, **in_loaders, auto_augment=None)


def test_an_unknown_operation_of_timm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def swirl(image: Image.Image, **_: Any) -> Image.Image:
        return image

    monkeypatch.setitem(timm_policies.NAME_TO_OP, "Invert", swirl)
    with pytest.raises(ConfigError, match=r"Invert does not work on batches; set data\.augment"):
        BatchPolicy(configured())
