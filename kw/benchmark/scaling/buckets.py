"""Gradients over the backward pass: when they come, into which bucket they go, what is left over.

DDP adds up buckets of gradients while the backward pass goes on. A bucket starts when the last of
its gradients is there and the bucket before it is done; what ends after the backward pass is
exposed (Li et al., PyTorch Distributed, VLDB 2020, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["ORDERS", "Gradient", "Timeline", "fill_buckets", "in_order", "reduce_in_buckets"]

MIB = 2**20
ORDERS = ("arrival", "registration", "single")
"""Of gradients in buckets: as they come; the parameters' order in the network, reversed, by which
one would guess it; or one bucket for all, as in torch's first update."""


@dataclass(frozen=True)
class Gradient:
    """A parameter's gradient.

    Attributes:
        name: of the parameter.
        bytes: of the gradient.
        ready: when it is complete, as a share of the backward pass.
        used: of a warehouse's cells, when the first layer uses them, as a share of the forward
            pass; ``None`` for all other parameters.
    """

    name: str
    bytes: int
    ready: float
    used: float | None = None


@dataclass(frozen=True)
class Timeline:
    """The reductions of one update.

    Attributes:
        buckets: bytes of each, in the order in which they are reduced.
        seconds: all reductions together.
        exposed: seconds from the end of the backward pass to that of the last reduction.
    """

    buckets: tuple[int, ...]
    seconds: float
    exposed: float


def fill_buckets(sizes: Sequence[int], limit: float, first: float | None = None) -> list[list[int]]:
    """Divide gradients into buckets as DDP does: one after another, none split.

    Args:
        sizes: bytes, in order.
        limit: a bucket that holds so many bytes is closed.
        first: the same for the first bucket, where it differs.

    Returns:
        The gradients' places, bucket by bucket.
    """
    buckets: list[list[int]] = []
    held, bound = 0, limit if first is None else first
    current: list[int] = []
    for place, size in enumerate(sizes):
        current.append(place)
        held += size
        if held >= bound:
            buckets.append(current)
            current, held, bound = [], 0, limit
    return [*buckets, current] if current else buckets


def in_order(gradients: Sequence[Gradient], order: str) -> list[Gradient]:
    """Gradients, given as their parameters are registered, in one of :data:`ORDERS`."""
    backwards = list(reversed(gradients))
    return sorted(backwards, key=lambda g: g.ready) if order == "arrival" else backwards


def reduce_in_buckets(
    gradients: Sequence[Gradient],
    backward: float,
    reduce: Callable[[int], float],
    *,
    limit: float,
    first: float | None = None,
    order: str = "arrival",
) -> Timeline:
    """Follow an update's reductions.

    Args:
        gradients: as their parameters are registered.
        backward: seconds of the backward pass.
        reduce: bytes -> seconds of a reduction.
        limit: see :func:`fill_buckets`; bytes.
        first: likewise.
        order: one of :data:`ORDERS`.
    """
    ordered = in_order(gradients, order)
    if order == "single":
        limit, first = float("inf"), None
    sizes = [gradient.bytes for gradient in ordered]
    end, busy, buckets = 0.0, 0.0, []
    for places in fill_buckets(sizes, limit, first):
        ready = backward * max(ordered[place].ready for place in places)
        size = sum(sizes[place] for place in places)
        seconds = reduce(size)
        end = max(end, ready) + seconds
        busy += seconds
        buckets.append(size)
    return Timeline(tuple(buckets), busy, max(end - backward, 0.0))
