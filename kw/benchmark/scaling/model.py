"""What an update takes on N GPUs, and what it holds: DDP, and FSDP2 with sharded warehouses.

DDP: ``T(N) = forward + backward + exposed(N) + optimizer``, see :mod:`.buckets`.

FSDP2: ``T(N) = forward + stalls(N) + backward + exposed(N) + optimizer / N``. All parameters but
cells are gathered before the forward pass. Cells are gathered before the first layer that uses
them, the next warehouse's from the moment on when the ones before are in use; a layer stalls until
they are there. A gradient is scattered as soon as it is complete, that of the rest after the
backward pass. With resharding, what was gathered is given up after the forward pass and gathered
again in the backward pass, at the same stalls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from .buckets import MIB, Gradient, reduce_in_buckets
from .links import Cluster

__all__ = ["Memory", "Scaled", "Step", "memory_of", "scale_ddp", "scale_fsdp"]


@dataclass(frozen=True)
class Step:
    """A training step of one process.

    Attributes:
        images: of its batch.
        forward: seconds.
        backward: seconds.
        optimizer: seconds.
    """

    images: int
    forward: float
    backward: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True)
class Scaled:
    """An update on several GPUs.

    Attributes:
        gpus: N.
        seconds: T(N).
        exposed: communication that nothing hides, seconds.
        efficiency: one GPU's step over T(N).
        images_per_second: of all GPUs.
    """

    gpus: int
    seconds: float
    exposed: float
    efficiency: float
    images_per_second: float


def scale_ddp(
    step: Step,
    gradients: Sequence[Gradient],
    cluster: Cluster,
    gpus: int,
    *,
    limit: float = 25 * MIB,
    first: float | None = None,
    order: str = "arrival",
) -> Scaled:
    """An update with DDP; arguments as for :func:`kw.benchmark.scaling.buckets.reduce_in_buckets`.

    Raises:
        BenchmarkError: the number of GPUs does not fill nodes.
    """
    timeline = reduce_in_buckets(
        gradients,
        step.backward,
        partial(cluster.all_reduce, gpus=gpus),
        limit=limit,
        first=first,
        order=order,
    )
    return _scaled(step, gpus, step.seconds + timeline.exposed, timeline.exposed)


def scale_fsdp(
    step: Step,
    gradients: Sequence[Gradient],
    cluster: Cluster,
    gpus: int,
    *,
    reshard: bool = False,
) -> Scaled:
    """An update with FSDP2: every warehouse's cells are a unit, everything else is another.

    Raises:
        BenchmarkError: the number of GPUs does not fill nodes.
    """
    rest = sum(gradient.bytes for gradient in gradients if gradient.used is None)
    cells = [gradient for gradient in gradients if gradient.used is not None]

    def part(size: float) -> float:
        return cluster.all_gather(size, gpus)

    def stalls(shares: list[tuple[float, int]], seconds: float) -> float:
        # (share of the pass at which a unit is first used, bytes); gathered one ahead.
        stall = gathered = part(rest)
        reached = 0.0
        for share, size in sorted(shares):
            gathered = max(gathered, reached) + part(size)
            reached = share * seconds + stall
            waiting = max(gathered - reached, 0.0)
            stall, reached = stall + waiting, reached + waiting
        return stall

    exposed = stalls([(cell.used or 0.0, cell.bytes) for cell in cells], step.forward)
    if reshard:
        # Last used in the forward pass, first in the backward pass: taken as mirror images.
        order = sorted(cells, key=lambda cell: cell.ready)
        starts = [0.0, *(cell.ready for cell in order)]
        pairs = zip(starts, order, strict=False)
        exposed += stalls([(start, cell.bytes) for start, cell in pairs], step.backward)
    ready = sorted(cells, key=lambda cell: cell.ready)
    timeline = reduce_in_buckets(
        [Gradient("rest", rest, 1.0), *reversed(ready)], step.backward, part, limit=1
    )
    exposed += timeline.exposed
    seconds = step.forward + step.backward + step.optimizer / gpus + exposed
    return _scaled(step, gpus, seconds, exposed)


def _scaled(step: Step, gpus: int, seconds: float, exposed: float) -> Scaled:
    return Scaled(gpus, seconds, exposed, step.seconds / seconds, gpus * step.images / seconds)


@dataclass(frozen=True)
class Memory:
    """Bytes on every GPU, activations not counted.

    Attributes:
        parameters: of the network.
        gradients: of all parameters.
        optimizer: its state.
        average: the moving average.
        gathered: beyond what is sharded: whole parameters during a step, and the largest whole
            gradient before it is scattered.
    """

    parameters: float
    gradients: float
    optimizer: float
    average: float
    gathered: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.average + self.gathered


def memory_of(
    gradients: Sequence[Gradient],
    gpus: int,
    *,
    states: int = 2,
    average: bool = False,
    sharded: bool = False,
) -> Memory:
    """What a GPU holds: ``P (2 + states + average)`` bytes with DDP, whose gradients are views of
    its buckets; with FSDP2 an N-th of it, and what is gathered.

    Args:
        gradients: of all parameters, P bytes together.
        gpus: N.
        states: values that the optimizer keeps for each parameter: 2 of AdamW, 1 of SGD with
            momentum.
        average: whether there is a moving average.
        sharded: FSDP2.
    """
    whole = sum(gradient.bytes for gradient in gradients)
    part = whole / gpus if sharded else whole
    gathered = 0
    if sharded:
        cells = [gradient.bytes for gradient in gradients if gradient.used is not None]
        gathered = whole + max([*cells, whole - sum(cells)])
    return Memory(part, part, states * part, part if average else 0.0, gathered)
