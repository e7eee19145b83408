"""``kw.load``: a trained classifier, ready for images, from a file of any supported format.

Detectors are loaded by the same function: by :mod:`kw.detection.predictor`, or :mod:`.detector`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.channels import Reader
from ..data.preprocess import BatchPreprocessor
from ..data.reading import Picture
from ..data.transforms import build_transform
from ..errors import say
from ..hub import WEIGHTS, is_hub_name, weights_file
from ..models.build import build_network, without_sources
from ..training.checkpoint import load_network
from ..training.trained import detector_config
from .description import DETECTION, Description, ExportError
from .graph import load_graph
from .onnx_file import OnnxNetwork
from .runtimes import RUNTIMES
from .source import read_source, ready
from .weights import cast, read_weights

if TYPE_CHECKING:
    from ..objects.found import Detector

FORMATS = (".pth", ".safetensors", ".onnx", ".pt2", ".xml", ".pte")
_EXPECTED = f"a work directory of kw train, a file {', '.join(FORMATS)}, or hf-hub:user/model"


class Prediction(NamedTuple):
    """One of the classes that an image may be."""

    label: int
    """place in :attr:`Classifier.classes`"""
    name: str
    probability: float
    """of this class against the others; where images have several classes, of its presence"""


class Classifier(nn.Module):
    """A network with its preprocessing and the names of its classes, in evaluation mode.

    Args:
        network: normalised images ``[B, N, H, W]`` -> logits ``[B, C]``, N ``data.channels``.
        description: of it.
        exported: the network is a traced one, which takes what ``description.input`` says.

    Attributes:
        classes: class names, in the order of the logits.
        transform: image of any size -> tensor ``[N, H, W]`` of ``data.input_size``, as in
            evaluation; uint8, or float32 with ``data.pixels: uint16``.
    """

    def __init__(
        self, network: nn.Module, description: Description, exported: bool = False
    ) -> None:
        super().__init__()
        config = description.config
        self.network = network
        self.description = description
        self.exported = exported
        self.classes = description.classes
        self.transform = build_transform(config.data, False)
        self.preprocess = BatchPreprocessor(config.data, config.model.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[B, N, H, W]`` -> logits ``[B, C]``; see :meth:`normalise`.

        Raises:
            ValueError: an exported file does not take images of this shape.
        """
        if self.exported:
            self.description.input.check(images)
        return self.network(images)

    def read(self, image: Picture) -> Tensor:
        """An image as a tensor ``[N, H, W]``, resized and cropped as in evaluation.

        Args:
            image: a file, an image of Pillow's, or an array of one: uint8 ``[H, W, 3]``, or grey
                ``[H, W]`` in uint8 or uint16; for other ``data.channels`` or 16 bits ``[H, W, N]``.

        Raises:
            BadImageError: it cannot be read as an image.
            ValueError: an array of another kind.
        """
        return self.transform(Reader.of(self.description.config.data)(image))

    def _read(self, item: Picture | Tensor) -> Tensor:
        """As :meth:`read`; a tensor that it returned is not changed."""
        if not isinstance(item, Tensor):
            return self.read(item)
        data = self.description.config.data
        dtype = torch.uint8 if data.pixels == "uint8" else torch.float32
        shape = (data.channels, *data.shape)
        if item.dtype != dtype or item.shape != shape:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"a tensor of {list(item.shape)}, {item.dtype}: expected {name} {list(shape)}, "
                "as read() gives it; give other images as files, arrays or Pillow's"
            )
        return item

    def normalise(self, images: Tensor) -> Tensor:
        """``[B, N, H, W]`` of :meth:`read` -> what the network takes, on its device."""
        batch = {"images": images, "labels": torch.zeros(len(images), dtype=torch.long)}
        return self.preprocess(batch, training=False)[0]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """``[B, N, H, W]`` of :meth:`read` -> float32 ``[B, C]``; in parts of a fixed batch."""
        fixed = self.description.input.batch
        if fixed is None:
            return self(self.normalise(images)).float()
        found = []
        for part in images.split(fixed):
            missing = fixed - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            found.append(self(self.normalise(whole)).float()[: len(part)])
        return torch.cat(found)

    def predict(
        self,
        images: Picture | Iterable[Picture | Tensor] | Tensor,
        k: int = 5,
        batch_size: int = 32,
    ) -> list[list[Prediction]]:
        """The likeliest classes of images.

        Args:
            images: files, PIL images and arrays as for :meth:`read`, or tensors
                ``[N, H, W]`` that it gave, also as one ``[B, N, H, W]``; a single one counts as a
                list of one.
            k: classes an image, at most all.
            batch_size: images that the network sees at a time.

        Returns:
            For every image its classes, the likeliest first.

        Raises:
            BadImageError: a file cannot be read as an image.
            ValueError: ``k`` or ``batch_size`` is below 1; an array or a tensor of another kind.
        """
        if k < 1 or batch_size < 1:
            raise ValueError(f"k is {k}, batch_size {batch_size}: expected 1 or more")
        is_one = isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4
        if is_one or isinstance(images, (str, os.PathLike, Image.Image)):
            images = [images]  # type: ignore[list-item]  # an iterable of several is no array
        items: Sequence[Picture | Tensor] = list(images)
        found = []
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            found += self.best(self.logits(torch.stack([self._read(item) for item in some])), k)
        return found

    def best(self, logits: Tensor, k: int) -> list[list[Prediction]]:
        """The ``k`` likeliest classes of every row of logits ``[B, C]``."""
        several = self.description.config.several_classes
        probabilities = logits.sigmoid() if several else logits.softmax(1)
        top = probabilities.topk(min(k, len(self.classes)))
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            [Prediction(label, self.classes[label], p) for label, p in zip(*row, strict=True)]
            for row in rows
        ]


def load(
    path: str | os.PathLike[str], device: str = "cpu", weights: str = "auto"
) -> Classifier | Detector:
    """A ready classifier or detector, in evaluation mode, at temperature 0.

    Both have ``predict(images)``: of a classifier a list of its :class:`Prediction` for every
    image, of a detector a ``Found`` (:mod:`kw.detection`).

    Args:
        path: a checkpoint of kw train or its work directory; or a ``.safetensors``,
            ``.onnx``, ``.pt2``, ``.xml`` (OpenVINO) or ``.pte`` (ExecuTorch) file of kw export; or
            a folder of ``kw pull``, or its name on the Hugging Face Hub,
            ``"hf-hub:user/model[@revision]"``. ``.pt2`` and ``.pte`` files, and the ``config.py``
            of a detector's run, are programs: load none from a stranger.
        device: where it computes.
        weights: of a checkpoint: ``"model"``, ``"ema"``, or ``"auto"``: the average where there is
            one.

    Raises:
        UserError: there is no such file, it cannot be read, or is nothing of these; the message
            says what was expected.
    """
    file = weights_file(str(path)) if is_hub_name(path) else Path(path)
    is_detector = detector_config(file) is not None
    of_hub = file.is_dir() and not any(file.glob("*.pth")) and (file / WEIGHTS).is_file()
    if of_hub and not is_detector:
        file = file / WEIGHTS
    if not file.exists():
        raise ExportError(f"{file}: no such file or folder; expected {_EXPECTED}")
    suffix = ".pth" if file.is_dir() else file.suffix
    if is_detector:
        from ..detection.predictor import load as load_detector

        return load_detector(file, device, weights)
    if suffix == ".pth":
        source = read_source(file, weights=weights)
        network, description = source.network, source.description
        for note in source.notes:
            say(note)
    elif suffix == ".safetensors":
        state, description = read_weights(file)
        network = build_network(without_sources(description.config.model))
        load_network(network, cast(state, torch.float32), str(file))
        network = ready(network)
    elif suffix == ".onnx":
        network = OnnxNetwork(file, device)
        if network.metadata.get("task") == DETECTION:
            from .detector import ExportedDetector

            return ExportedDetector(network, str(file))
        description = Description.from_strings(network.metadata, str(file))
    elif suffix == ".pt2":
        network, description = load_graph(file)
    elif suffix in RUNTIMES:
        if device != "cpu":
            raise ExportError(f"{file}: {suffix} files are computed on the CPU here; use cpu")
        network = RUNTIMES[suffix](file)
        description = Description.from_strings(network.metadata, str(file))
    else:
        raise ExportError(f"{file}: expected {_EXPECTED}, found {suffix or 'no suffix'!r}")
    classifier = Classifier(network, description, exported=suffix in (".onnx", ".pt2", *RUNTIMES))
    if suffix != ".pt2":  # a traced program refuses eval() and to()
        return classifier.eval().to(device)
    if device != "cpu":
        raise ExportError(f"{file}: a .pt2 file computes where it was traced, on the CPU; use cpu")
    return classifier
