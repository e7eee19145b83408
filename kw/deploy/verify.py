"""Compare a written file with its network, at other batches and sizes and on real images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor, nn

from ..errors import one_line
from .description import ExportError, InputRange

Network = Callable[[Tensor], Tensor]
BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, or to 1 if that is more."""

MARGIN = 3.0
"""How many times PyTorch's own distance from float64 a file may have: it sums in another order."""
RUINED = 0.5
"""The difference above which a file of less precision is wrong: rounding does not explain it."""
WORST = 0.01
"""The rounding of PyTorch's float32 above which a comparison with float64 means nothing."""


@dataclass
class Difference:
    """How the logits of a file and its network differ.

    Attributes:
        largest: largest difference, relative to the largest logit of the batch where that is
            above 1.
        images: that were compared.
        same: those of them that both give the same class.
        shapes: of the batches.
        rounding: the same difference of the network in float32 from itself in float64, where
            ``largest`` was too large to be taken as it is.
        exact: of the file from the network in float64, likewise.
    """

    largest: float = 0.0
    images: int = 0
    same: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    rounding: float | None = None
    exact: float | None = None

    @property
    def is_rounding(self) -> bool:
        """Whether the file is about as near to float64 as PyTorch in float32 is."""
        if self.rounding is None or self.exact is None:
            return False
        return self.exact <= max(TOLERANCE, MARGIN * self.rounding) and self.rounding <= WORST

    def add(self, expected: Tensor, found: Tensor, shape: tuple[int, ...]) -> None:
        """Add the logits ``[B, C]`` of a batch.

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
    """Normal noise: every batch size at the network's own size, then, if sizes are open, the least
    size and an oblong one."""
    generator = torch.Generator().manual_seed(seed)
    batches = BATCHES if inputs.batch is None else (inputs.batch,)
    channels, (height, width) = inputs.channels, inputs.sides
    shapes = [(batch, channels, height, width) for batch in batches]
    some = batches[min(1, len(batches) - 1)]
    shapes += [(some, channels, *sides) for sides in inputs.further_sides]
    for shape in shapes:
        yield torch.randn(shape, generator=generator)


def real_batches(images: Sequence[Tensor], inputs: InputRange) -> Iterator[Tensor]:
    """Images ``[C, H, W]`` in batches of every size in turn; an incomplete last one is left out."""
    start = 0
    for size in cycle(BATCHES if inputs.batch is None else (inputs.batch,)):
        if start + size > len(images):
            return
        yield torch.stack(list(images[start : start + size]))
        start += size


@torch.no_grad()
def compare(reference: Network, written: Network, batches: Iterable[Tensor]) -> Difference:
    """Run a network and the file on the same normalised images ``[B, 3, H, W]``.

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


def judge_by_float64(
    reference: nn.Module, written: Network, batches: Sequence[Tensor], difference: Difference
) -> Difference:
    """Add how far both are from the network in float64, for networks that magnify rounding."""
    double = copy.deepcopy(reference).double()

    def exact(images: Tensor) -> Tensor:
        return double(images.double())

    return replace(
        difference,
        rounding=compare(exact, reference, batches).largest,
        exact=compare(exact, written, batches).largest,
    )
