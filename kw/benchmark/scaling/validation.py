"""The model against what processes of one machine really took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from .buckets import MIB, fill_buckets, in_order, reduce_in_buckets
from .files import Processes, Profile
from .links import Cluster, Link

__all__ = ["Validation", "fit_link", "validate"]


@dataclass(frozen=True)
class Validation:
    """One number of processes.

    Attributes:
        count: processes.
        alone: seconds of an update of one process with the machine for itself.
        apart: of so many at once that do not communicate.
        together: of DDP.
        predicted: of DDP, from ``apart``.
        serial: the same, if the backward pass hid nothing.
        link: between the processes, as fitted; ``None`` for one.
    """

    count: int
    alone: float
    apart: float
    together: float
    predicted: float
    serial: float
    link: Link | None


def fit_link(times: Mapping[int, float], count: int) -> Link:
    """The ring's link that suits measured all-reduces best, by relative error.

    Args:
        times: seconds by bytes.
        count: processes of the ring.
    """
    sizes = np.array([*times], dtype=float)
    seconds = np.array([*times.values()])
    slope, constant = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    steps = 2 * (count - 1)
    return Link(steps / count / float(slope), max(float(constant), 0.0) / steps)


def validate(result: Processes, profile: Profile) -> list[Validation]:
    """Every number of processes of a result.

    The profile's step, of the same network, gives the shares of its parts; their sum is taken from
    the processes that ran apart.
    """
    found, measured = [], result.measured
    alone = median(measured.apart[min(measured.apart)])
    step = profile.measured.step
    share = step.backward / step.seconds
    for count, times in measured.together.items():
        apart, together = median(measured.apart[count]), median(times)
        if count == 1:
            found.append(Validation(1, alone, apart, together, apart, apart, None))
            continue
        link = fit_link(measured.reduce[count], count)
        cluster = Cluster("this machine", count, link, link)
        timeline = reduce_in_buckets(
            profile.measured.gradients,
            share * apart,
            partial(cluster.all_reduce, gpus=count),
            limit=result.bucket_mb * MIB,
            first=first_limit(result, profile, count),
        )
        predicted, serial = apart + timeline.exposed, apart + timeline.seconds
        found.append(Validation(count, alone, apart, together, predicted, serial, link))
    return found


def first_limit(result: Processes, profile: Profile, count: int) -> float | None:
    """DDP's limit of the first bucket: 1 MiB where it was left to torch, else that of the rest."""
    sizes = [gradient.bytes for gradient in in_order(profile.measured.gradients, "arrival")]
    uniform = fill_buckets(sizes, result.bucket_mb * MIB)
    found = len(result.measured.buckets[count])
    return None if found == len(uniform) else float(MIB)
