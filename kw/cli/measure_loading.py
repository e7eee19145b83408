"""Measure how fast a configuration's training batches come, from files and from memory.

kw benchmark loading configs/tiny_imagenet/resnet18/resnet18.yaml
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..config import Config, load_config
from ..data import BatchPreprocessor, Loader, open_training, stop_workers
from ..errors import UserError, one_line
from ..evaluation import render_table
from .tool import ToolParser, add_config_options, device, number


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument(
        "--threads", type=number(int, 1, 1024), default=1, help="CPU threads, default 1"
    )
    parser.add_argument(
        "--images", type=number(int, 1, 10**9), default=4096, help="to read, default 4096"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header = ("images from", "opened in (s)", "images/s", "images/s of processor time")
    rows, refused = [], []
    for name, memory in (
        ("files", "null"),
        ("memory of the device", "{place: device}"),
        ("memory of the host", "{place: host}"),
    ):
        options = [*args.cfg_options, f"data.memory={memory}"]
        try:
            rows.append((name, *_measure(load_config(args.config, options), args)))
        except UserError as error:  # such as images of different sizes
            if memory == "null":
                raise
            refused.append(f"{name}: not measured, {one_line(error)}")
    print(render_table(header, rows))
    for reason in refused:
        print(reason)


def _measure(config: Config, args: Any) -> tuple[str, str, str]:
    """Opening and reading, batches ready for the network; processor time is this process's."""
    place = torch.device(args.device)
    started = time.perf_counter()
    loader = open_training(config, place, 0, 1)
    opened = time.perf_counter() - started
    preprocess = BatchPreprocessor(config.data, config.model.num_classes).to(place)
    batches = endless(loader)
    for _ in range(2):  # to warm up
        preprocess(next(batches), True)
    _wait(place)
    wall, own, count = time.perf_counter(), time.process_time(), 0
    while count < args.images:
        batch = next(batches)
        preprocess(batch, True)
        count += len(batch["labels"])
    _wait(place)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    stop_workers(loader)
    return f"{opened:.1f}", f"{count / wall:,.0f}", f"{count / own:,.0f}"


def endless(loader: Loader) -> Iterator[dict[str, Any]]:
    """The batches of one epoch after another."""
    sampler: Any = loader.batch_sampler
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
