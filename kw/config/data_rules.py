"""Rules on the settings of a classifier's images that concern several of them."""

from __future__ import annotations

import re
from collections.abc import Callable

from .schema import Config

_NUMBER = r"\d+(\.\d+)?"
# timm reads a policy leniently: options that it does not know are ignored or fail an assertion.
_POLICIES = re.compile(
    rf"rand(-(m|n|mmax)\d+|-(p|mstd){_NUMBER}|-inc[01]|-t(weights|3aw|3a))*"
    rf"|augmix(-(m|w|d)\d+|-(a|mstd){_NUMBER}|-b[01])*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)


def check_data_rules(config: Config, expect: Callable[..., None]) -> None:
    """The rules; arguments as for :func:`kw.config.rules.check_rules`."""
    data = config.data
    if data.progressive is not None:
        growth, key = data.progressive, "data.progressive"
        height, width = data.shape
        expect(height == width, "null beside a data.input_size that is not square", key)
        expect(growth.start <= height, "at most data.input_size", f"{key}.start")
        expected = "less than epochs, so that some have data.input_size"
        expect(growth.epochs < config.epochs, expected, f"{key}.epochs", "epochs")
    for name in ("crop_scale", "crop_ratio"):
        low, high = getattr(data, name)
        expect(low <= high, "[low, high] with low <= high", f"data.{name}")
    policy, smooth = data.auto_augment, data.interpolation in ("bilinear", "bicubic")
    expected = (
        "a timm policy such as 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original', '3a', or null"
    )
    expect(policy is None or bool(_POLICIES.fullmatch(policy)), expected, "data.auto_augment")
    if policy is not None and data.augments_on_device:
        where = "data.augment_on" if data.memory is None else "data.memory"
        why = "AugMix works on one image at a time, not on batches of tensors"
        expected = f"another policy or null beside {where}: {why}"
        expect(not policy.startswith("augmix"), expected, "data.auto_augment", where)
        expected = f"bilinear or bicubic beside data.auto_augment and {where}"
        expect(smooth, expected, "data.interpolation", where)
    elif policy is not None:
        expected = "bicubic, bilinear or nearest beside data.auto_augment, which rotates images"
        expect(data.interpolation != "lanczos", expected, "data.interpolation", "data.auto_augment")
    if data.memory is not None:
        why = "they work on one image at a time, not on batches of tensors"
        expected = f"empty beside data.memory: {why}"
        expect(not data.transforms, expected, "data.transforms", "data.memory")
    if data.decoder == "fast":
        expected = "pillow beside data.memory, which decodes every image once"
        expect(data.memory is None, expected, "data.decoder", "data.memory")
        expected = "pillow beside data.transforms, which take Pillow images"
        expect(not data.transforms, expected, "data.decoder", "data.transforms")
        expected = "bicubic, bilinear or nearest beside data.decoder fast"
        expect(data.interpolation != "lanczos", expected, "data.interpolation", "data.decoder")
    _check_channels(config, expect)


def _check_channels(config: Config, expect: Callable[..., None]) -> None:
    """Rules on the number of channels, 16-bit pixels and the shape of images."""
    data, key = config.data, "data.channels"
    given = config.model.timm_args.get("in_chans", data.channels)
    expected = f"{data.channels}, which data.channels says: set the number of channels there alone"
    expect(given == data.channels, expected, "model.timm_args", key)
    for name in ("mean", "std"):
        count = len(getattr(data, name))
        expected = f"a list of {data.channels} numbers, one a channel (docs/data.md measures them)"
        expect(count == data.channels, expected, f"data.{name}", key)
    keys = (key, "data.pixels")
    if data.decoder == "fast":
        right = data.channels == 3 and data.pixels == "uint8"
        expect(right, "pillow: the fast decoder gives RGB in bytes", "data.decoder", *keys)
    if data.are_pictures:
        return
    why = "it works on grey and RGB images in bytes"
    for name, none in (("auto_augment", "null"), ("color_jitter", "null"), ("transforms", "{}")):
        expect(not getattr(data, name), f"{none}: {why}", f"data.{name}", *keys)
    expected = "bilinear or bicubic: these images are resized as tensors"
    smooth = data.interpolation in ("bilinear", "bicubic")
    expect(smooth, expected, "data.interpolation", *keys)
    expected = "null beside data.pixels uint16: images are held as bytes"
    expect(data.memory is None or data.pixels == "uint8", expected, "data.memory", "data.pixels")
