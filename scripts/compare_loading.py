#!/usr/bin/env python
"""Compare the images a second of one core: this project's loader, timm's and torchvision's.

python scripts/compare_loading.py FOLDER            # FOLDER/train/CLASS/*.jpg
python scripts/compare_loading.py FOLDER --policy rand-m5
python scripts/compare_loading.py FOLDER --workers 1 2 --plot loading.png

Training batches of uint8, 224 pixels: random resized crop and mirroring. timm and torchvision apply
the policy to each image; this project does so where it says cpu, and else leaves it to the device.
The folder is packed as JPEG files and as pixels, shorter side 256 (kw pack). All loaders read in
this process, taken in turn; figures are images per second of processor time, median and range of
the rounds. With --workers: images per second of wall time with so many loader processes, and the
largest growth of a process's own memory from the second epoch on.
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder as TorchvisionFolder

from kw.cli import ToolParser, number, output_file, run_tool
from kw.cli.measure_loading import endless
from kw.config import Config, config_from_mapping
from kw.config.data_schema import DataConfig
from kw.data import open_training, stop_workers
from kw.data.listing import list_split
from kw.data.packing import Packing, pack
from kw.evaluation import render_table
from kw.pictures.style import new_figure, save

SIZE = 224
Batches = Iterator[Any]


def settings(root: Path, batch: int, workers: int = 0, **data: Any) -> Config:
    return config_from_mapping(
        {
            "model": {"name": "resnet18"},
            "data": {"root": str(root), "workers": workers, **data},
            "optimizer": {"lr": 0.1},
            "epochs": 1,
            "total_batch_size": batch,
            "batch_size": batch,
        }
    )


def own(config: Config) -> Batches:
    return endless(open_training(config, torch.device("cpu"), 0, 1))


def by_timm(folder: Path, policy: str | None, batch: int) -> Batches:
    dataset = create_dataset("", str(folder / "train"))
    loader: Any = create_loader(
        dataset, (3, SIZE, SIZE), batch, is_training=True, auto_augment=policy, color_jitter=0.0,
        interpolation="bicubic", num_workers=0, device=torch.device("cpu"), pin_memory=False,
        persistent_workers=False,
    )  # fmt: skip
    while True:
        yield from loader.loader  # before the part that runs on the device


def by_torchvision(folder: Path, policy: str | None, batch: int) -> Batches:
    steps: list[Any] = [
        tv.RandomResizedCrop(SIZE, interpolation=tv.InterpolationMode.BICUBIC),
        tv.RandomHorizontalFlip(),
    ]
    steps += [tv.RandAugment()] if policy else []
    dataset = TorchvisionFolder(str(folder / "train"), tv.Compose([*steps, tv.PILToTensor()]))
    loader: DataLoader[Any] = DataLoader(dataset, batch, shuffle=True, drop_last=True)
    while True:
        yield from loader


def packed(folder: Path, out: Path, kind: str) -> Path:
    listing = {"train": list_split(DataConfig(root=str(folder)), "train")}
    pack(listing, folder, out, Packing(kind))
    return out


def sources(folder: Path, packs: Path, policy: str | None) -> dict[str, dict[str, Any]]:
    """The project's loaders: name, and settings of the data."""
    fast: dict[str, Any] = {"decoder": "fast"}
    found: dict[str, dict[str, Any]] = {
        "pillow": {"root": folder},
        "fast": {"root": folder, **fast},
    }
    if policy is not None:
        found = {f"{name}, policy on cpu": each for name, each in found.items()}
        fast["augment_on"] = "device"
        found["fast"] = {"root": folder, **fast}
    found["fast, packed JPEG"] = {"root": packed(folder, packs / "jpeg.zip", "jpeg"), **fast}
    found["fast, packed pixels"] = {"root": packed(folder, packs / "raw.zip", "raw"), **fast}
    return {name: {**each, "auto_augment": policy} for name, each in found.items()}


def images_per_second(
    batches: Batches, images: int, batch: int, clock: Callable[[], float]
) -> float:
    begin, count = clock(), 0
    while count < images:
        next(batches)
        count += batch
    return count / (clock() - begin)


def on_one_core(loaders: dict[str, Batches], args: Any) -> str:
    """The table."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for round_ in range(args.rounds + 1):
        for name, batches in loaders.items():
            rate = images_per_second(batches, args.images, args.batch_size, time.process_time)
            if round_:  # the first warms up
                rates[name].append(rate)
    base = statistics.median(rates["timm"])
    rows = []
    for name, found in rates.items():
        middle = statistics.median(found)
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        rows.append((name, f"{middle:,.0f}", spread, f"{middle / base:.2f}"))
    return render_table(("loader", "images/s", "range", "of timm's"), rows)


def own_memory(process: Any) -> float:
    """MiB that a process shares with no file: pages of a mapped file do not count."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", text)[0]) / 1024


def with_workers(config: Config, images: int) -> tuple[float, float]:
    """Images a second of wall time; the largest growth of a loader process's memory, MiB."""
    loader = open_training(config, torch.device("cpu"), 0, 1)
    batches = endless(loader)
    for _ in range(2 * len(loader)):
        next(batches)
    processes = loader._iterator._workers  # type: ignore[union-attr]
    before = [own_memory(each) for each in processes]
    rate = images_per_second(batches, images, config.batch_size, time.perf_counter)
    grown = max(own_memory(p) - old for p, old in zip(processes, before, strict=True))
    stop_workers(loader)
    return rate, grown


def over_workers(kinds: dict[str, dict[str, Any]], args: Any) -> str:
    """A table by number of loader processes, and its plot."""
    found = {
        name: [with_workers(settings(batch=args.batch_size, workers=n, **each), args.images * 8)
               for n in args.workers]
        for name, each in kinds.items()
    }  # fmt: skip
    if args.plot is not None:
        draw(args.plot, args.workers, {name: [r for r, _ in each] for name, each in found.items()})
    rows = [
        (name, str(n), f"{rate:,.0f}", f"{grown:+.1f}")
        for name, each in found.items()
        for n, (rate, grown) in zip(args.workers, each, strict=True)
    ]
    return render_table(("loader", "processes", "images/s", "growth (MiB)"), rows)


def draw(path: Path, workers: Sequence[int], rates: dict[str, list[float]]) -> None:
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for name, each in rates.items():
        axes.plot(workers, each, marker="o", label=name)
    axes.set(xlabel="loader processes", ylabel="images per second", xticks=list(workers), ylim=0)
    axes.legend()
    save(figure, path)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="train/ in it has a folder for every class")
    parser.add_argument("--policy", help="a policy of timm; torchvision gets its RandAugment")
    parser.add_argument("--rounds", type=number(int, 1, 100), default=8)
    parser.add_argument("--images", type=number(int, 1, 10**6), default=100, help="of a round")
    parser.add_argument("--batch-size", type=number(int, 1, 10**4), default=50)
    parser.add_argument("--workers", type=number(int, 1, 512), nargs="+", metavar="N")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="of --workers")
    args = parser.parse_args()
    if not (args.folder / "train").is_dir():
        parser.error(f"{args.folder}: expected a folder with train/ in it")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as packs:
        kinds = sources(args.folder, Path(packs), args.policy)
        if args.workers:
            print(over_workers(kinds, args))
            return
        what = args.folder, args.policy, args.batch_size
        loaders = {"timm": by_timm(*what), "torchvision": by_torchvision(*what)}
        for name, each in kinds.items():
            loaders[f"kw, {name}"] = own(settings(batch=args.batch_size, **each))
        print(on_one_core(loaders, args))


if __name__ == "__main__":
    run_tool(main)
