"""The settings of a classifier's images: reading, augmentation, loading."""

# ruff: noqa: RUF009 -- setting() and table() return dataclasses.field()
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..registry import DATASETS
from .fields import setting, table
from .run_schema import BadImagesConfig


@dataclass
class RandomErasingConfig:
    """Random erasing (Zhong et al., 2020), on the device, after normalisation."""

    probability: float = setting(0.25, "probability per image", "[0, 1]")
    mode: str = setting(
        "pixel",
        "what a rectangle is filled with: noise per pixel, one random colour, or zeros",
        choices=("pixel", "rand", "const"),
    )
    count: int = setting(1, "largest number of rectangles per erased image", "[1, 100]")


@dataclass
class MemoryConfig:
    """Images decoded once and held in memory, as bytes; they are augmented as batches, on the
    device that trains (docs/data.md)."""

    place: str = setting(
        "device", "memory of the training device, or of its host", choices=("device", "host")
    )
    size: int | None = setting(
        None,
        "side of the stored training images, pixels: the shorter side is resized to it, then the "
        "centre is cropped; null = unchanged, all images of one size",
        "[1, 8192]",
    )


@dataclass
class ProgressiveConfig:
    """Training images that grow with the epochs, resized on the device; test images do not
    (EfficientNetV2, Tan and Le, ICML 2021)."""

    start: int = setting(doc="side in the first epoch, pixels", bounds="[1, 8192]", example=128)
    epochs: int = setting(
        doc="epochs over which the side grows linearly to input_size, which the rest have",
        bounds="[1, 1_000_000]",
        example=60,
    )
    multiple: int = setting(
        32, "sides in between are rounded down to a multiple of this", "[1, 8192]"
    )


@dataclass
class DataConfig:
    """Images, augmentation and loading."""

    root: str = setting(
        doc="a folder with train/ and val/, each with one folder per class", example="data/imagenet"
    )
    input_size: int | list[int] = setting(
        224, "side of the square network input, or [height, width], pixels", "[1, 8192]", length=2
    )
    channels: int = setting(
        3,
        "channels of the images and of the network's input: 1 = grey, 3 = RGB; others as stored, "
        "e.g. 4 of RGBA files or the bands of a TIFF file (docs/data.md)",
        "[1, 1024]",
    )
    pixels: str = setting(
        "uint8",
        "uint8: bytes, to which 16-bit files are scaled; uint16: 16 bits are kept, in a float32 "
        "tensor",
        choices=("uint8", "uint16"),
    )
    progressive: ProgressiveConfig | None = setting(
        None,
        "begin with smaller training images, e.g. {start: 128, epochs: 60}; null = input_size in "
        "every epoch",
    )
    workers: int = setting(
        4, "loader processes per device; 0 = load in the training process", "[0, 512]"
    )
    memory: MemoryConfig | None = setting(
        None,
        "keep decoded images in memory, e.g. {place: device}; null = read the files in every epoch",
    )
    repeats: int = setting(
        1,
        "repeated augmentation: times that an image is trained on in a row, augmented anew each "
        "time; an epoch keeps its updates and has 1 / repeats of the images",
        "[1, 1024]",
    )
    sampling: str = setting(
        "shuffle",
        "shuffle: every training image once an epoch; balanced: drawn with replacement, every "
        "class equally likely",
        choices=("shuffle", "balanced"),
    )
    bad_images: BadImagesConfig = table(BadImagesConfig, "files that cannot be read")
    exif_orientation: str = setting(
        "apply",
        "apply: rotate images as their EXIF data say; ignore: use them as stored, as torchvision "
        "and timm do",
        choices=("apply", "ignore"),
    )
    decoder: str = setting(
        "pillow",
        "pillow: exact; fast: more images a second, pixels differ by a few levels "
        "(docs/loading.md)",
        choices=("pillow", "fast"),
    )
    mean: list[float] = setting(
        [0.485, 0.456, 0.406], "means of inputs in [0, 1], one a channel", "[0, 1]"
    )
    std: list[float] = setting(
        [0.229, 0.224, 0.225],
        "standard deviations of inputs in [0, 1], one a channel",
        "[1e-6, 1e6]",
    )
    interpolation: str = setting(
        "bicubic",
        "interpolation of resized images",
        choices=("bilinear", "bicubic", "nearest", "lanczos"),
    )
    test_crop_ratio: float = setting(
        0.875, "test images are resized to input_size / ratio, then cropped", "[0.1, 1]"
    )
    crop_scale: list[float] = setting(
        [0.08, 1.0], "area range of the random resized crop, fractions", "(0, 1]", length=2
    )
    crop_ratio: list[float] = setting(
        [0.75, 1.3333],
        "aspect range of the random resized crop, width / height",
        "[1e-3, 1e3]",
        length=2,
    )
    horizontal_flip: float = setting(0.5, "probability of a horizontal flip", "[0, 1]")
    color_jitter: float | None = setting(
        None, "strength of brightness, contrast and saturation jitter", "[0, 10]"
    )
    auto_augment: str | None = setting(
        None, "timm policy, e.g. rand-m9-mstd0.5-inc1 (where given, it replaces color_jitter)"
    )
    augment_on: str = setting(
        "cpu",
        "where auto_augment and color_jitter work: cpu: on Pillow images, in the loaders; device: "
        "on whole batches, on the device that trains (docs/data.md)",
        choices=("cpu", "device"),
    )
    transforms: dict[str, dict[str, Any]] = setting(
        {},
        "further transforms of a training image before the crop: registered names, with their "
        "arguments",
    )
    random_erasing: RandomErasingConfig | None = setting(None, "random erasing")
    mixup: float = setting(0.0, "alpha of mixup's Beta distribution; 0 = off", "[0, 1000]")
    cutmix: float = setting(0.0, "alpha of cutmix's Beta distribution; 0 = off", "[0, 1000]")
    mix_probability: float = setting(
        1.0, "probability that mixup or cutmix is applied to a batch", "[0, 1]"
    )
    mix_switch_probability: float = setting(
        0.5, "probability of cutmix instead of mixup if both are on", "[0, 1]"
    )
    dataset: str = setting(
        "folder", "how a split's files, labels and classes are found", choices=DATASETS
    )
    dataset_args: dict[str, Any] = setting({}, "keyword arguments of the data set")

    @property
    def augments_on_device(self) -> bool:
        """Whether policy and colour jitter work on batches, on the device that trains."""
        return self.augment_on == "device" or self.memory is not None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the network's input, pixels."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def are_pictures(self) -> bool:
        """Whether images are Pillow's, grey or RGB in bytes; other images are tensors."""
        return self.channels in (1, 3) and self.pixels == "uint8"
