"""What policies do to batches of tensors, operation by operation, against Pillow."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from policies import (
    RAND,
    configured,
    from_pillow,
    names,
    pictures,
    timms_steps,
    to_pillow,
    with_timm,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kw.data import derive_seed
from kw.data.policies import BatchPolicy, Step
from kw.data.transforms import policy_operations, training_steps

EXACT: dict[str, Sequence[float]] = {
    "auto_contrast": [0],
    "equalize": [0],
    "invert": [0],
    "solarize": [0, 1, 100, 128, 255, 256],
    "solarize_add": [0, 1, 50, 110, 128],
    "posterize": [0, 1, 2, 4, 7, 8],
}
# Blends and filters: Pillow computes them in floating point, which compilers may contract.
BLENDED: dict[str, Sequence[float]] = {
    "brightness": [0.1, 0.55, 0.9, 1, 1.3, 1.9],
    "contrast": [0.1, 0.55, 0.9, 1, 1.3, 1.9],
    "color": [0.0, 0.1, 0.55, 1, 1.3, 1.9],
    "sharpness": [0.1, 0.55, 0.9, 1, 1.3, 1.9],
    "desaturate": [0.0, 0.5, 0.7, 1],
    "gaussian_blur": [0.1, 0.3, 0.5, 0.9, 1, 1.3, 1.7, 2],
}
MOVED: dict[str, Sequence[float]] = {
    "shear_x": [-0.3, 0.27, 0.05, 0],
    "shear_y": [-0.3, 0.27, 0.05, 0],
    "translate_x_rel": [-0.45, 0.3, 0.111, 0],
    "translate_y_rel": [0.45, -0.3, 0.111, 0],
    "rotate": [-30, 27, 3.3, 0, 90, 180],
}
SIZES = [(32, 32), (37, 50), (21, 64), (2, 3), (1, 1)]


def differences(steps: Iterable[Step], interpolation: str = "bicubic") -> torch.Tensor:
    """Levels between ours and timm's, of every channel of every pixel of all pictures and sizes."""
    config = configured(interpolation=interpolation)
    policy, found = BatchPolicy(config), []
    for size in SIZES:
        images = pictures(*size)
        for step in steps:
            ours = policy.apply(images, [[step]] * len(images))
            theirs = [from_pillow(with_timm(to_pillow(image), step, config)) for image in images]
            found.append((ours.int() - torch.stack(theirs).int()).abs().flatten())
    return torch.cat(found)


@pytest.mark.parametrize("name", EXACT)
def test_levels_are_replaced_as_by_pillow(name: str) -> None:
    assert differences([Step(name, value) for value in EXACT[name]]).max() == 0


@pytest.mark.parametrize("name", BLENDED)
def test_blends_and_filters_are_pillows(name: str) -> None:
    off = differences([Step(name, value) for value in BLENDED[name]])
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.001


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", MOVED)
def test_pixels_move_as_in_pillow(name: str, interpolation: str) -> None:
    """Pillow cuts fractions off, where rounding decides of a whole number."""
    off = differences([Step(name, value) for value in MOVED[name]], interpolation)
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.02


def test_all_of_timms_operations_are_compared() -> None:
    names = {
        op.aug_fn.__name__
        for policy in (RAND, "rand-m9", "rand-t3a", "v0", "v0r", "original", "originalr", "3a")
        for op in policy_operations(training_steps(configured(policy))[1])
    }
    assert names == {*EXACT, *BLENDED, *MOVED, "gaussian_blur_rand"}


@pytest.mark.parametrize("policy", ["v0", "v0r", "original-mstd0.5", "originalr", "3a"])
def test_autoaugment_gives_timms_images(policy: str) -> None:
    """Under the same seed: these policies draw from Python's generator alone."""
    config = configured(policy)
    (theirs,) = timms_steps(config)
    image = pictures(30, 41)[2]
    seeds = [derive_seed(policy, i) for i in range(200)]
    ours = BatchPolicy(config)(image.expand(200, -1, -1, -1), seeds)
    off, changed = [], 0
    for seed, mine in zip(seeds, ours, strict=True):
        random.seed(seed)
        expected = from_pillow(theirs(to_pillow(image)))
        off.append((mine.int() - expected.int()).abs().flatten())
        changed += not torch.equal(expected, image)
    levels = torch.cat(off)
    # An operation that follows may make more of one level: equalize, inversion above a limit.
    assert (levels > 1).float().mean() < 0.002
    assert (levels > 0).float().mean() < 0.02
    assert changed > 120


def test_colour_jitter_is_torchvisions() -> None:
    """Each image with factors and an order of its own; torchvision calls these functions too."""
    images, config = pictures(20, 27), configured(None, color_jitter=0.9)
    policy = BatchPolicy(config)
    chosen = policy.choose([derive_seed(i) for i in range(len(images))])
    assert len({names(steps) for steps in chosen}) > 1
    for image, steps, ours in zip(images, chosen, policy.apply(images, chosen), strict=True):
        pillow = to_pillow(image)
        for step in steps:
            pillow = with_timm(pillow, step, config)
        assert (ours.int() - from_pillow(pillow).int()).abs().max() <= 2


class Recorder(TorchDispatchMode):
    """Fails where the host reads a tensor, or a shape that is known to the device only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {
            "_local_scalar_dense", "nonzero", "masked_select", "bincount", "histc", "equal"
        }  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*EXACT, *BLENDED, *MOVED])
def test_nothing_is_read_from_the_device(name: str) -> None:
    step = Step(name, {**EXACT, **BLENDED, **MOVED}[name][0])
    policy, images = BatchPolicy(configured()), pictures(8, 9)
    with Recorder():
        policy.apply(images, [[step]] * 3 + [[]] * 2)
    # A tensor on the meta device has no values: reading one on the host would raise.
    found = policy.apply(images.to("meta"), [[step]] * 5)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
