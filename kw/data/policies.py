"""timm's augmentation policies and colour jitter for a batch of bytes, on any device.

timm reads a policy's name and draws each image's operations, strengths and signs, from a generator
seeded for that image: the distributions are those of :func:`kw.data.transforms.build_transform`,
the draws are not. The result for an image depends on its own seed only, not on its batch. The host
knows what is drawn: images that get the same operation are computed together, and nothing is read
from the device.

Legend: B images, H x W their size.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.auto_augment import AugmentOp, RandAugment
from torch import Tensor
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2.functional import equalize

from kw.config import ConfigError
from kw.config.data_schema import DataConfig
from kw.data import pixel_ops
from kw.data.transforms import policy_operations, training_steps


class Step(NamedTuple):
    """An operation on one image."""

    name: str
    """of timm's function"""
    value: float = 0.0
    """its argument, where it has one"""


_LEVELS = np.arange(256)
_JITTER = {"brightness": "brightness", "contrast": "contrast", "saturation": "color"}


def _table(rule: Callable[[Any], np.ndarray]) -> tuple[Callable[..., Tensor], Callable[[Any], Any]]:
    """An operation that replaces levels, by what they become with an argument."""
    return pixel_ops.look_up, lambda value: rule(value).astype(np.uint8)


# For timm's functions: what computes them, and its parameters for one image, from the argument.
_OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Any], Any]]] = {
    "auto_contrast": (lambda images, _: pixel_ops.auto_contrast(images), lambda _: []),
    "equalize": (lambda images, _: equalize(images), lambda _: []),
    "invert": _table(lambda _: 255 - _LEVELS),
    "solarize": _table(lambda limit: np.where(limit > _LEVELS, _LEVELS, 255 - _LEVELS)),
    "solarize_add": _table(
        lambda add: np.where(_LEVELS < 128, np.minimum(_LEVELS + add, 255), _LEVELS)
    ),
    # No bits at all: black, as in kw.data.transforms.
    "posterize": _table(lambda bits: _LEVELS & -(1 << (8 - min(max(bits, 0), 8)))),
    "brightness": _table(lambda f: np.minimum(np.float32(f) * _LEVELS.astype(np.float32), 255)),
    "contrast": (pixel_ops.adjust_contrast, lambda factor: [factor]),
    "color": (pixel_ops.adjust_colour, lambda factor: [factor]),
    "desaturate": (pixel_ops.adjust_colour, lambda part: [min(max(1 - part, 0), 1)]),
    "sharpness": (pixel_ops.adjust_sharpness, lambda factor: [factor]),
    "gaussian_blur": (pixel_ops.blur, pixel_ops.box_weights),
    # timm draws the strength inside of the function.
    "gaussian_blur_rand": (pixel_ops.blur, pixel_ops.box_weights),
}
# Pillow's matrices of those that move pixels, from argument, width and height.
_MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "shear_x": lambda factor, width, height: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, width, height: (1, 0, 0, factor, 1, 0),
    "translate_x_rel": lambda part, width, height: (1, 0, part * width, 0, 1, 0),
    "translate_y_rel": lambda part, width, height: (1, 0, 0, 0, 1, part * height),
    "rotate": pixel_ops.rotation,
}


class BatchPolicy:
    """``data.auto_augment`` and ``data.color_jitter`` for batches of images of one size.

    Raises:
        ConfigError: the installed timm's policy has an operation that is not among those here.
    """

    def __init__(self, config: DataConfig) -> None:
        if config.channels == 1:  # as RGB, see __call__
            config = replace(config, channels=3, mean=config.mean * 3)
        self.steps = training_steps(config)[1]
        self.cubic = config.interpolation == "bicubic"
        self.fill: tuple[int, ...] = ()
        for op in policy_operations(self.steps):
            name = op.aug_fn.__name__
            if name not in _OPERATIONS and name not in _MATRICES:
                raise ConfigError(
                    f"data.auto_augment {config.auto_augment}: its {op.name} does not work on "
                    "batches; set data.augment_on: cpu, and data.memory: null"
                )
            op.aug_fn = _noting(name)
            self.fill = op.kwargs["fillcolor"]

    def choose(self, seeds: Sequence[int]) -> list[list[Step]]:
        """Draw the operations on each image, in their order, from one 64-bit seed per image."""
        state = random.getstate()
        try:
            return [self._choose(seed) for seed in seeds]
        finally:
            random.setstate(state)

    def _choose(self, seed: int) -> list[Step]:
        random.seed(seed)  # timm's generator
        chosen: list[Step] = []
        for step in self.steps:
            if isinstance(step, ColorJitter):
                chosen += _jitter(step)
            elif isinstance(step, RandAugment):
                for op in _pick(step):
                    op(chosen)
            else:
                step(chosen)
        return chosen

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Augment uint8 [B, 3, H, W], or grey [B, 1, H, W], on any device, which is not changed;
        one 64-bit seed per image."""
        if images.shape[1] == 1:
            return self(images.expand(-1, 3, -1, -1), seeds)[:, :1]
        return self.apply(images, self.choose(seeds))

    def apply(self, images: Tensor, chosen: Sequence[Sequence[Step]]) -> Tensor:
        """Apply drawn operations, a list for each image; else as for calling."""
        height, width = images.shape[2:]
        images = images.clone(memory_format=torch.contiguous_format)
        for turn in zip_longest(*chosen):
            # Of each function: the images' places in the batch, and their parameters.
            groups: dict[Callable[..., Tensor], dict[int, Any]] = defaultdict(dict)
            for place, step in enumerate(turn):
                if step is None:  # this image has had all of its operations
                    continue
                if step.name in _MATRICES:
                    matrix = _MATRICES[step.name](step.value, width, height)
                    groups[self._affine][place] = [*matrix, *self.fill]
                else:
                    function, row = _OPERATIONS[step.name]
                    groups[function][place] = row(step.value)
            for function, rows in groups.items():
                places = _sent(np.array(list(rows)), images.device)
                parameters = np.stack(list(rows.values()))
                few = images.index_select(0, places)
                images.index_copy_(0, places, function(few, _sent(parameters, images.device)))
        return images

    def _affine(self, images: Tensor, matrices: Tensor) -> Tensor:
        return pixel_ops.affine(images, matrices, self.cubic)


def _noting(name: str) -> Callable[..., list[Step]]:
    """In place of timm's function on an image: one that adds the call to a list."""

    def note(chosen: list[Step], value: float = 0.0, **_: Any) -> list[Step]:
        if name == "gaussian_blur_rand":
            value = random.uniform(0.1, 2.0 * value)
        chosen.append(Step(name, value))
        return chosen

    return note


def _pick(policy: RandAugment) -> Iterator[AugmentOp]:
    """The operations on one image; timm draws them from NumPy's generator, likewise."""
    if policy.choice_weights is None:
        yield from random.choices(policy.ops, k=policy.num_layers)
        return
    ops, weights = list(policy.ops), list(policy.choice_weights)
    for _ in range(policy.num_layers):  # none twice
        (place,) = random.choices(range(len(ops)), weights)
        del weights[place]
        yield ops.pop(place)


def _jitter(jitter: ColorJitter) -> Iterator[Step]:
    for name in random.sample(list(_JITTER), len(_JITTER)):
        if bounds := getattr(jitter, name):
            yield Step(_JITTER[name], random.uniform(*bounds))


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
