#!/usr/bin/env python
"""Compute how training scales to many GPUs from one process's step: docs/scaling.md's formula.

python scripts/scaling.py configs/imagenet/resnet18/kw_resnet18_4x.yaml --gpus 8 64 512
python scripts/scaling.py CONFIG --step-ms 4.6 11.1 0.5    # a step that was measured elsewhere

The step's parts and the time at which each gradient is complete are measured here; bandwidths are
those of H100 nodes with 400 Gb/s InfiniBand unless they are given.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from kw.benchmark.timing import between, now
from kw.cli import ToolParser, add_config_options, number, run_tool
from kw.config import ConfigError, load_config
from kw.evaluation import render_table
from kw.models import build_network
from kw.training.optim import build_optimizer

ROUNDS = 4  # the first warms up


class Links(NamedTuple):
    """How fast GPUs add up a tensor; bytes a second of a GPU in each direction, seconds a step."""

    per_node: int
    node: float
    network: float
    node_latency: float = 3.4e-6  # NCCL's cost model, src/graph/tuning.cc: ring, protocol Simple
    network_latency: float = 14e-6
    call: float = 8.4e-6

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds: a ring in each node, and a ring or tree of each GPU with its peers in others."""
        n = min(gpus, self.per_node)
        if gpus % n:
            raise ConfigError(f"--gpus {gpus}: expected whole nodes of {self.per_node}")
        if gpus == 1:
            return 0.0
        m = gpus // n
        share, steps = 2 * (m - 1) / m, 2 * (m - 1)
        ring = share * size / n / self.network + steps * self.network_latency
        rounds = 2 * math.ceil(math.log2(m))
        tree = 2 * size / n / self.network + rounds * self.network_latency
        inside = 2 * (n - 1) / n * size / self.node + 2 * (n - 1) * self.node_latency
        return self.call + inside + min(ring, tree)


def exposed(
    gradients: list[tuple[float, int]],
    backward: float,
    limit: float,
    reduce: Callable[[float], float],
) -> float:
    """Seconds from the end of the backward pass to that of the last reduction.

    Args:
        gradients: when each is complete, as a share of the backward pass, and its bytes.
        backward: seconds of the backward pass.
        limit: a bucket that holds so many bytes is closed.
        reduce: bytes -> seconds.
    """
    end, held = 0.0, 0
    ordered = sorted(gradients)
    for place, (ready, size) in enumerate(ordered):
        held += size
        if held >= limit or place == len(ordered) - 1:
            end = max(end, ready * backward) + reduce(held)
            held = 0
    return max(end - backward, 0.0)


def profile(config: Any, batch: int, device: str) -> tuple[list[float], list[tuple[float, int]]]:
    """Seconds of forward pass, backward pass and update; gradients for :func:`exposed`."""
    network = build_network(config.model).to(device).train()
    optimizer = build_optimizer(network, config.optimizer, torch.device(device))
    images = torch.randn(batch, config.data.channels, *config.data.shape, device=device)
    labels = torch.randint(config.model.num_classes, (batch,), device=device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    done: dict[nn.Parameter, Any] = {}
    on_gpu = device == "cuda"

    def note(parameter: Any) -> None:
        done[parameter] = now(on_gpu)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(note)
    parts, shares = [], []
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        marks = [now(on_gpu)]
        loss = nn.functional.cross_entropy(network(images), labels)
        marks.append(now(on_gpu))
        loss.backward()
        marks.append(now(on_gpu))
        optimizer.step()
        marks.append(now(on_gpu))
        if on_gpu:
            torch.cuda.synchronize()
        parts.append([between(a, b) for a, b in pairwise(marks)])
        shares.append([between(marks[1], done[p]) / parts[-1][1] for p in parameters])
    ready = [median(each) for each in zip(*shares[1:], strict=True)]
    sizes = [p.numel() * p.element_size() for p in parameters]
    return [median(each) for each in zip(*parts[1:], strict=True)], [
        *zip(ready, sizes, strict=True)
    ]


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = 128 if device == "cuda" else 8
    parser.add_argument("--batch-size", type=number(int, 1), default=batch, help=f"({batch})")
    parser.add_argument(
        "--step-ms",
        nargs=3,
        type=number(float, 0),
        help="forward, backward, update of such a batch",
    )
    parser.add_argument("--gpus", nargs="+", type=number(int, 1), default=[8, 64, 512])
    parser.add_argument("--per-node", type=number(int, 1), default=8, help="GPUs of a node (8)")
    for name, speed in (("node", 370), ("network", 47)):
        what = f"GB/s that a GPU attains in its {name} ({speed})"
        parser.add_argument(f"--{name}-gbs", type=number(float, 1e-3), default=speed, help=what)
    parser.add_argument("--bucket-mb", type=number(float, 1e-3), default=25, help="(25)")
    args = parser.parse_args()
    config = load_config(args.config, args.cfg_options)
    step, gradients = profile(config, args.batch_size, device)
    if args.step_ms is not None:
        step = [each / 1e3 for each in args.step_ms]
    links = Links(args.per_node, args.node_gbs * 1e9, args.network_gbs * 1e9)
    rows = []
    for gpus in (1, *args.gpus):
        rest = exposed(
            gradients, step[1], args.bucket_mb * 2**20, partial(links.all_reduce, gpus=gpus)
        )
        seconds = sum(step) + rest
        rate = gpus * args.batch_size / seconds
        rows.append((str(gpus), f"{1e3 * rest:.2f}", f"{sum(step) / seconds:.1%}", f"{rate:.0f}"))
    parts = ", ".join(f"{1e3 * each:.1f}" for each in step)
    print(f"forward, backward, update ms: {parts}; {sum(b for _, b in gradients) / 1e6:.1f} MB")
    print(render_table(("GPUs", "exposed ms", "efficiency", "images/s"), rows))


if __name__ == "__main__":
    run_tool(main)
