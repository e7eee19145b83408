"""How long processes take to add up a tensor: links, and the formula of a hierarchical ring.

Legend: S bytes, n GPUs of a node, m nodes, N = n * m GPUs.

A ring of n takes ``2 (n - 1) / n * S / bandwidth + 2 (n - 1) * latency``: a reduce-scatter and an
all-gather of n - 1 steps each (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009). Between
nodes every GPU adds up its own n-th of the tensor, in a ring or in a double binary tree
(``2 * S / n / bandwidth + 2 ceil(log2 m) * latency``; Sanders, Speck and Traeff, Parallel Computing
35, 2009), whichever is quicker, as NCCL chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..conditions import BenchmarkError

__all__ = ["CLUSTERS", "Cluster", "Link"]


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a ring.

    Attributes:
        bandwidth: bytes a second that a GPU attains in each direction.
        latency: seconds a step of the ring takes beyond its bytes.
        source: of both figures.
    """

    bandwidth: float
    latency: float
    source: str = ""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        title: for tables.
        gpus_per_node: n.
        inside: between the GPUs of a node.
        between: from a GPU to its peer in another node, all GPUs of a node at once.
        call: seconds a collective takes beyond its steps.
    """

    title: str
    gpus_per_node: int
    inside: Link
    between: Link
    call: float = 0.0

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds to add up a tensor over all GPUs and give all of them the sum.

        Args:
            size: S, bytes.
            gpus: N: not more than a node has, or whole nodes.

        Raises:
            BenchmarkError: the nodes would not be filled evenly.
        """
        n = min(gpus, self.gpus_per_node)
        if gpus < 1 or gpus % n:
            raise BenchmarkError(
                f"{gpus} GPUs: expected up to {self.gpus_per_node}, or whole nodes of as many"
            )
        m = gpus // n
        if gpus == 1 or not size:
            return 0.0
        return self.call + _ring(size, n, self.inside) + _between(size / n, m, self.between)

    def all_gather(self, size: float, gpus: int) -> float:
        """Seconds to give all GPUs a tensor of which each has a part; a reduce-scatter takes as
        long. Either is half of :meth:`all_reduce`."""
        whole = self.all_reduce(size, gpus)
        return whole and self.call + (whole - self.call) / 2


def _ring(size: float, members: int, link: Link) -> float:
    steps = 2 * (members - 1)
    return steps / members * size / link.bandwidth + steps * link.latency


def _between(size: float, members: int, link: Link) -> float:
    tree = 2 * size / link.bandwidth + 2 * math.ceil(math.log2(members)) * link.latency
    return min(_ring(size, members, link), tree)


_TUNING = "NCCL's own cost model, src/graph/tuning.cc: ring, protocol Simple"
_NVLINK = Link(
    370e9,
    3.4e-6,
    "NVLink 4 has 450 GB/s a direction (NVIDIA H100 SXM), of which NCCL attains 370 "
    f"(NVIDIA/nccl-tests issue 212); latency: {_TUNING}",
)


def _ethernet(gigabits: float, gpus: int) -> Link:
    # Of a 32 Gb/s network NCCL was seen to attain at most 60 % over TCP.
    return Link(
        0.6 * gigabits / 8 * 1e9 / gpus,
        50e-6,
        f"one port of {gigabits:g} Gb/s a node, shared by its {gpus} process(es), of which TCP "
        "attains 60 % (NVIDIA/nccl issue 209); latency of a step 50 us: assumed",
    )


CLUSTERS = {
    "h100-ndr": Cluster(
        "H100 SXM, 8 a node, NDR InfiniBand 400 Gb/s a GPU",
        8,
        _NVLINK,
        Link(
            47e9,
            14e-6,
            "400 Gb/s = 50 GB/s, of which NCCL attains 46 to 48 (NVIDIA/nccl-tests issue 290); "
            f"latency: {_TUNING}",
        ),
        call=8.4e-6,
    ),
    "h100-ethernet100": Cluster(
        "H100 SXM, 8 a node, one 100 Gb/s Ethernet port a node",
        8,
        _NVLINK,
        _ethernet(100, 8),
        call=8.4e-6,
    ),
    "h100-ethernet25": Cluster(
        "H100 SXM, 8 a node, one 25 Gb/s Ethernet port a node",
        8,
        _NVLINK,
        _ethernet(25, 8),
        call=8.4e-6,
    ),
    "cpu-ethernet25": Cluster(
        "CPU nodes of one process, 25 Gb/s Ethernet", 1, Link(math.inf, 0.0), _ethernet(25, 1)
    ),
}
"""Clusters by name. Their bandwidths are attained ones, with their sources."""
