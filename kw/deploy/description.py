"""The description in an exported file: enough to use the file without this project.

Its parts are JSON texts by name, which ONNX and safetensors store as metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from ..config import Config, ConfigError, config_from_mapping, to_dict
from ..config.data_schema import DataConfig
from ..errors import UserError

MARK = "kernelwarehouse"
"""The part that marks files of this project; its value is the version of the layout."""
VERSION = "1"
DETECTION = '"detection"'
"""The part ``task`` of a detector's file; a classifier's has none."""


class ExportError(UserError):
    """A network cannot be exported as asked, or a file is not one that was exported here."""


@dataclass(frozen=True)
class InputRange:
    """What images a file takes: float32 ``[B, channels, H, W]``, normalised.

    Attributes:
        size: side of the images that the network was made for, or their height and width, pixels.
        least: least height and width; ``None`` where only ``size`` is taken.
        batch: the number of images; ``None`` for any.
        precision: of weights and arithmetic; inputs and logits are float32.
        channels: of the images.
    """

    size: int | tuple[int, int]
    least: int | None = None
    batch: int | None = None
    precision: str = "fp32"
    channels: int = 3

    @staticmethod
    def of(data: DataConfig) -> InputRange:
        """The images of a configuration, of its size only."""
        height, width = data.shape
        return InputRange(height if height == width else data.shape, channels=data.channels)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of ``size``."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def further_sides(self) -> tuple[tuple[int, int], ...]:
        """Other heights and widths at which a file is tried, if it takes any: the least, and an
        oblong one."""
        if self.least is None:
            return ()
        return (self.least, self.least), (self.sides[0] + 9, self.least + 2)

    @property
    def words(self) -> str:
        """``size`` for people: ``"224 x 224"``, height first."""
        return " x ".join(map(str, self.sides))

    def check(self, images: Tensor) -> None:
        """Refuse images that such a file does not take.

        Raises:
            ValueError: the shape is another.
        """
        fits = images.dim() == 4 and images.shape[1] == self.channels
        if self.least is None:
            fits = fits and tuple(images.shape[2:]) == self.sides
        else:
            fits = fits and min(images.shape[2:]) >= self.least
        if not fits or self.batch not in (None, len(images)):
            side = "H, W" if self.least is not None else f"{self.sides[0]}, {self.sides[1]}"
            open_sides = "" if self.least is None else f", H and W from {self.least} on"
            batch = "B" if self.batch is None else self.batch
            raise ValueError(
                f"images {list(images.shape)}: the file takes "
                f"[{batch}, {self.channels}, {side}]{open_sides}"
            )


@dataclass(frozen=True)
class Description:
    """A network's description.

    Attributes:
        model: its name.
        classes: class names, in the order of the logits.
        config: the configuration, resolved.
        weights: ``"model"`` or ``"ema"``.
        epoch: epochs trained, where known.
        metrics: what the run's last evaluation found, where known.
        input: what images it takes.
        versions: of the packages that wrote the file.
    """

    model: str
    classes: list[str]
    config: Config
    weights: str
    epoch: int | None
    metrics: dict[str, float]
    input: InputRange
    versions: dict[str, str] = field(default_factory=dict)

    def to_strings(self) -> dict[str, str]:
        """The parts as JSON texts by name."""
        parts = {
            "model": self.model,
            "classes": self.classes,
            "preprocessing": preprocessing(self.config.data),
            "input": asdict(self.input),
            "weights": {"of": self.weights, "epoch": self.epoch, "metrics": self.metrics},
            "config": to_dict(self.config),
            "versions": self.versions,
        }
        texts = {name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}
        return {MARK: VERSION, **texts}

    @staticmethod
    def from_strings(texts: Mapping[str, str], source: str) -> Description:
        """The description that :meth:`to_strings` wrote.

        Raises:
            ExportError: it is missing, or its parts are not what was written.
        """
        if texts.get("task") == DETECTION:
            raise ExportError(
                f"{source}: is of a detector, which needs the config.py that kw pull --allow-code "
                "brings; name the folder that has both"
            )
        if texts.get(MARK) != VERSION:
            raise ExportError(
                f"{source}: holds no description of a classifier, as kw export writes it "
                f"(metadata {MARK!r}: expected {VERSION!r}, found {texts.get(MARK)!r})"
            )
        try:
            weights = json.loads(texts["weights"])
            given = {"channels": 3, **json.loads(texts["input"])}  # older files name none
            if isinstance(given["size"], list):
                given["size"] = tuple(given["size"])
            known = {part.name for part in fields(InputRange)}
            description = Description(
                model=_of(str, json.loads(texts["model"])),
                classes=[_of(str, name) for name in _of(list, json.loads(texts["classes"]))],
                config=config_from_mapping(json.loads(texts["config"]), source),
                weights=_of(str, weights["of"]),
                epoch=None if weights["epoch"] is None else _of(int, weights["epoch"]),
                metrics={name: _of(float, value) for name, value in weights["metrics"].items()},
                input=InputRange(**{name: given[name] for name in known}),
                versions=_of(dict, json.loads(texts["versions"])),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ExportError(
                f"{source}: its description is damaged ({type(error).__name__}: {error}); export "
                "it again"
            ) from error
        if len(description.classes) != description.config.model.num_classes:
            raise ExportError(
                f"{source}: names {len(description.classes)} classes, its network has "
                f"{description.config.model.num_classes}"
            )
        return description


def preprocessing(data: DataConfig) -> dict[str, Any]:
    """The steps from an image to the network's input, as in evaluation, for other programs."""
    sides = [math.floor(side / data.test_crop_ratio) for side in data.shape]
    square = sides[0] == sides[1]
    colours = {1: "grey", 3: "RGB"} if data.are_pictures else {}
    return {
        "colour": colours.get(data.channels, f"{data.channels} channels as stored"),
        "exif_orientation": data.exif_orientation,
        **({"resize_shorter_side": sides[0]} if square else {"resize_to_cover": sides}),
        "interpolation": data.interpolation,
        "centre_crop": data.shape[0] if square else list(data.shape),
        "scale": "1/255" if data.pixels == "uint8" else "1/65535 of 16 bits, 1/255 of bytes",
        "mean": data.mean,
        "std": data.std,
        "layout": f"float32 [batch, {data.channels}, height, width]",
    }


def _of(kind: type, value: Any) -> Any:
    """The value if it has the type, else a TypeError."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value
