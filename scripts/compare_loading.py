#!/usr/bin/env python
"""Compare the images a second of one core: this project's loader, timm's and torchvision's.

python scripts/compare_loading.py FOLDER            # FOLDER/train/CLASS/*.jpg
python scripts/compare_loading.py FOLDER --policy rand-m9-mstd0.5-inc1

Training batches of uint8, 224 pixels: random resized crop, mirroring and the policy. All loaders
read the same files in this process, taken in turn; figures are images per second of processor time,
median and range of the rounds.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder as TorchvisionFolder

from kw.cli import ToolParser, number, run_tool
from kw.config import Config, config_from_mapping
from kw.data import open_training
from kw.evaluation import render_table

SIZE = 224


def own(folder: Path, policy: str | None, batch: int, decoder: str) -> Iterator[Any]:
    config = settings(folder, policy, batch, decoder)
    loader = open_training(config, torch.device("cpu"), 0, 1)
    sampler: Any = loader.batch_sampler
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def settings(folder: Path, policy: str | None, batch: int, decoder: str) -> Config:
    data = {"root": str(folder), "workers": 0, "decoder": decoder, "auto_augment": policy}
    return config_from_mapping(
        {
            "model": {"name": "resnet18"},
            "data": data,
            "optimizer": {"lr": 0.1},
            "epochs": 1,
            "total_batch_size": batch,
            "batch_size": batch,
        }
    )


def by_timm(folder: Path, policy: str | None, batch: int) -> Iterator[Any]:
    dataset = create_dataset("", str(folder / "train"))
    loader: Any = create_loader(
        dataset, (3, SIZE, SIZE), batch, is_training=True, auto_augment=policy, color_jitter=0.0,
        interpolation="bicubic", num_workers=0, device=torch.device("cpu"), pin_memory=False,
        persistent_workers=False,
    )  # fmt: skip
    while True:
        yield from loader.loader  # before the part that runs on the device


def by_torchvision(folder: Path, policy: str | None, batch: int) -> Iterator[Any]:
    steps: list[Any] = [
        tv.RandomResizedCrop(SIZE, interpolation=tv.InterpolationMode.BICUBIC),
        tv.RandomHorizontalFlip(),
    ]
    steps += [tv.RandAugment()] if policy else []
    dataset = TorchvisionFolder(str(folder / "train"), tv.Compose([*steps, tv.PILToTensor()]))
    loader: DataLoader[Any] = DataLoader(dataset, batch, shuffle=True, drop_last=True)
    while True:
        yield from loader


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="train/ in it has a folder for every class")
    parser.add_argument("--policy", help="a policy of timm; torchvision gets its RandAugment")
    parser.add_argument("--rounds", type=number(int, 1, 100), default=8)
    parser.add_argument("--images", type=number(int, 1, 10**6), default=100, help="of a round")
    parser.add_argument("--batch-size", type=number(int, 1, 10**4), default=50)
    args = parser.parse_args()
    if not (args.folder / "train").is_dir():
        parser.error(f"{args.folder}: expected a folder with train/ in it")
    torch.set_num_threads(1)
    what = args.folder, args.policy, args.batch_size
    loaders = {
        "timm": by_timm(*what),
        "torchvision": by_torchvision(*what),
        "kw, decoder pillow": own(*what, "pillow"),
        "kw, decoder fast": own(*what, "fast"),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for round_ in range(args.rounds + 1):
        for name, batches in loaders.items():
            begin, count = time.process_time(), 0
            while count < args.images:
                next(batches)
                count += args.batch_size
            if round_:  # the first warms up
                rates[name].append(count / (time.process_time() - begin))
    base = statistics.median(rates["timm"])
    rows = []
    for name, found in rates.items():
        middle = statistics.median(found)
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        rows.append((name, f"{middle:,.0f}", spread, f"{middle / base:.2f}"))
    print(render_table(("loader", "images/s", "range", "of timm's"), rows))


if __name__ == "__main__":
    run_tool(main)
