"""A written file against the network it was made of: other batches, other sizes, real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import one_line
from .description import ExportError, InputRange

__all__ = ["BATCHES", "TOLERANCE", "Difference", "compare", "random_images"]

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
"""Of logits, relative to the largest one or to 1, whichever is more."""


@dataclass
class Difference:
    """How two networks' logits differ.

    Attributes:
        largest: largest difference, relative to the largest logit of the batch where that is
            above 1.
        images: images that were compared.
        same: those of them that both give the same class.
        shapes: of the batches.
    """

    largest: float = 0.0
    images: int = 0
    same: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()

    def add(self, expected: Tensor, found: Tensor, shape: tuple[int, ...]) -> None:
        """Take in the logits ``[B, C]`` of a batch.

        Raises:
            ExportError: other shapes, or values that are not finite.
        """
        if found.shape != expected.shape or not found.isfinite().all():
            what = "values that are not finite" if found.shape == expected.shape else "logits"
            raise ExportError(
                f"the written file gives {what} {list(found.shape)} for images {list(shape)}; "
                f"expected {list(expected.shape)}"
            )
        scale = max(1.0, float(expected.abs().max()))
        self.largest = max(self.largest, float((found - expected).abs().max()) / scale)
        self.images += len(expected)
        self.same += int((found.argmax(1) == expected.argmax(1)).sum())
        if shape not in self.shapes:
            self.shapes = (*self.shapes, shape)


def random_images(inputs: InputRange, seed: int = 0) -> Iterator[Tensor]:
    """Normal noise: every batch size at the network's own size, then the least size and an oblong
    one, where these are open."""
    generator = torch.Generator().manual_seed(seed)
    batches = BATCHES if inputs.batch is None else (inputs.batch,)
    shapes = [(batch, 3, inputs.size, inputs.size) for batch in batches]
    if inputs.least is not None:
        some = batches[min(1, len(batches) - 1)]
        shapes += [
            (some, 3, inputs.least, inputs.least),
            (some, 3, inputs.size + 9, inputs.least + 2),
        ]
    for shape in shapes:
        yield torch.randn(shape, generator=generator)


@torch.no_grad()
def compare(reference: nn.Module, written: nn.Module, batches: Iterator[Tensor]) -> Difference:
    """Run both on the same images.

    Args:
        reference: the network.
        written: the file, as a network.
        batches: images ``[B, 3, H, W]``, normalised.

    Raises:
        ExportError: the file gives no finite logits of the expected shape.
    """
    difference = Difference()
    for images in batches:
        shape = tuple(images.shape)
        try:
            found = written(images)
        except MemoryError:
            raise
        except Exception as error:  # a runtime raises its own kinds
            raise ExportError(
                f"the written file refuses images {list(shape)}: {one_line(error)}"
            ) from error
        difference.add(reference(images), found, shape)
    return difference


def batched(images: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Images ``[3, S, S]`` in batches of alternating sizes, as far as they go."""
    start = turn = 0
    while start + sizes[turn % len(sizes)] <= len(images):
        size = sizes[turn % len(sizes)]
        yield torch.stack(list(images[start : start + size]))
        start, turn = start + size, turn + 1
