"""An exported detector: from a picture to its detections, without mmdetection.

What mmdetection does around the network is done here as the file's description says: resizing,
normalising, padding; masks laid over the picture; suppression, if the file has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, nms

from ..data.reading import BadImageError, Picture
from ..errors import memory_for
from ..objects.found import Detector, Found
from ..objects.run_lengths import encode_masks
from .description import DETECTION, MARK, VERSION, ExportError
from .onnx_file import OnnxNetwork


@dataclass(frozen=True)
class DetectorDescription:
    """The description in a detector's file.

    Attributes:
        model: its name.
        classes: names of its categories, by label.
        preprocessing: from a picture to the network's input: ``colour`` (the order of channels),
            ``exif_orientation``, ``max_pixels``, ``resize`` (``scale``, longer and shorter side, or
            ``scale_factor``; ``keep_ratio``), ``mean``, ``std``, ``pad_to_multiple_of``,
            ``pad_value`` (after normalising).
        input: of the network: ``image``, its shape, where None is open, and ``least``, its least
            height and width; ``size``.
        output: of the network: ``nms``, whether it suppresses boxes; ``masks``; and the detector's
            settings ``score_threshold``, ``iou_threshold``, ``class_agnostic``,
            ``max_detections``, ``mask_threshold``.
        weights: ``of`` (``"model"`` or ``"ema"``), ``epoch``, ``metrics``.
        config: the configuration, a Python text.
        versions: of the packages that wrote the file.
    """

    model: str
    classes: list[str]
    preprocessing: dict[str, Any]
    input: dict[str, Any]
    output: dict[str, Any]
    weights: dict[str, Any]
    config: str
    versions: dict[str, str] = field(default_factory=dict)

    def to_strings(self) -> dict[str, str]:
        """The parts as JSON texts by name."""
        parts = {name: json.dumps(p, ensure_ascii=False) for name, p in asdict(self).items()}
        return {MARK: VERSION, "task": DETECTION, **parts}

    @staticmethod
    def from_strings(texts: Mapping[str, str], source: str) -> DetectorDescription:
        """The description that :meth:`to_strings` wrote.

        Raises:
            ExportError: it is damaged, or of another version.
        """
        if texts.get(MARK) != VERSION:
            raise ExportError(
                f"{source}: its description has version {texts.get(MARK)!r}, expected {VERSION!r}"
            )
        try:
            parts = {
                part.name: json.loads(texts[part.name]) for part in fields(DetectorDescription)
            }
        except (KeyError, ValueError) as error:
            raise ExportError(
                f"{source}: its description is damaged ({type(error).__name__}: {error}); export "
                "it again"
            ) from error
        return DetectorDescription(**parts)


class ExportedDetector(Detector):
    """A detector from a file.

    Args:
        network: the file.
        source: its name, for messages.

    Attributes:
        description: of it.

    Raises:
        ExportError: the file's description is damaged, or OpenCV is missing.
    """

    def __init__(self, network: OnnxNetwork, source: str) -> None:
        self.description = DetectorDescription.from_strings(network.metadata, source)
        self.classes = self.description.classes
        self.has_masks = self.description.output["masks"]
        self.max_pixels = self.description.preprocessing["max_pixels"]
        self.upright = self.description.preprocessing["exif_orientation"] == "apply"
        self._session = network.session
        try:
            import cv2
        except ImportError as error:
            raise ExportError(
                f"{source}: a detector's pictures are resized by OpenCV, as in its training: "
                "pip install opencv-python-headless"
            ) from error
        self._resize: Any = cv2.resize

    def find(self, picture: Picture, score: float = 0.0) -> Found:
        """The detections in one picture, see :meth:`predict`."""
        image = self.read(picture)
        name = picture if isinstance(picture, (str, Path)) else "a picture"
        with memory_for(lambda: [name]):
            width, height = resized(image.size, self.description.preprocessing["resize"])
            if min(width, height) < 1:
                what = f"{image.width} x {image.height} pixels, of which resizing leaves nothing"
                raise BadImageError.of(name, what)
            pixels = self._resize(np.asarray(image), (width, height))  # bilinear
            padded = self.prepare(pixels)
            least = self.description.input["least"]
            if min(padded.shape[2:]) < least:
                what = f"resized to {width} x {height} pixels; the file takes sides from {least} on"
                raise BadImageError.of(name, what)
            given = {"image": padded.numpy(), "size": np.array([height, width], np.float32)}
            boxes, scores, labels, *masks = map(torch.from_numpy, self._session.run(None, given))
            chosen = scores >= max(score, 0.0)
            if not self.description.output["nms"]:
                chosen = self._suppressed(boxes, scores, labels)
                chosen = chosen[scores[chosen] >= score]
            boxes, scores, labels = boxes[chosen], scores[chosen], labels[chosen]
            boxes /= torch.tensor([width / image.width, height / image.height]).repeat(2)
            runs = None
            if masks:
                threshold = self.description.output["mask_threshold"]
                runs = lay_masks(masks[0][chosen], boxes, image.size, threshold)
        return Found(boxes, scores, labels, runs, image.size)

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """RGB ``[H, W, 3]`` -> the network's input ``[1, 3, H, W]``, normalised and padded."""
        settings = self.description.preprocessing
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
        if settings["colour"] == "BGR":
            image = image.flip(0)
        mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        image = (image - mean) / std
        multiple = settings["pad_to_multiple_of"]
        missing = [-side % multiple for side in image.shape[1:]]
        return F.pad(image, (0, missing[1], 0, missing[0]), value=settings["pad_value"])[None]

    def _suppressed(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Places of the detections among candidates, by falling score."""
        settings = self.description.output
        real = (scores > 0).nonzero().flatten()
        given = boxes[real], scores[real]
        if settings["class_agnostic"]:
            kept = nms(*given, settings["iou_threshold"])
        else:
            kept = batched_nms(*given, labels[real], settings["iou_threshold"])
        return real[kept[: settings["max_detections"]]]


def resized(size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height after ``resize`` of a description's preprocessing, as mmcv rounds them."""
    width, height = size
    if settings.get("scale_factor") is not None:
        x, y = settings["scale_factor"]
        scale = int(width * x + 0.5), int(height * y + 0.5)
    else:
        scale = tuple(settings["scale"])
    if not settings["keep_ratio"]:
        return scale
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def lay_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> list[dict[str, Any]]:
    """Masks of boxes as run lengths of masks of the picture, as mmdetection lays them.

    Args:
        masks: probabilities ``[N, h, w]`` of being inside, over the boxes.
        boxes: ``[N, 4]``, pixels of the picture.
        size: width and height of the picture.
        threshold: the least probability of a pixel inside.
    """
    width, height = size
    runs = []
    for mask, box in zip(masks, boxes, strict=True):
        left, top, right, bottom = box
        x0, y0 = (max(0, math.floor(side) - 1) for side in (left, top))
        x1, y1 = min(width, math.ceil(right) + 1), min(height, math.ceil(bottom) + 1)
        whole = torch.zeros(height, width, dtype=torch.bool)
        if x1 > x0 and y1 > y0:
            # Pixels are at their centres; the mask reaches from -1 to 1.
            x = (torch.arange(x0, x1) + 0.5 - left) / (right - left) * 2 - 1
            y = (torch.arange(y0, y1) + 0.5 - top) / (bottom - top) * 2 - 1
            x[x.isinf()], y[y.isinf()] = 0, 0  # of a box without width or height
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
            found = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
            whole[y0:y1, x0:x1] = found >= threshold
        runs += encode_masks(whole[None])
    return runs
