"""Runs that are killed at any moment and resumed until they end; also a longer check by hand::

python tests/kills.py --kills 100 --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kw.config import config_from_mapping
from kw.training import load_checkpoint, train

# What a clock says differs from run to run.
CLOCK = {"seconds", "images_per_second", "data_time"}


def settings(images: Path) -> dict[str, Any]:
    """Thirty-two updates, with all that draws numbers: mixing, erasing, drop path, workers, EMA."""
    return {
        "model": {
            "name": "resnet18",
            "num_classes": 4,
            "drop_path_rate": 0.3,
            "timm_args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
            "kernel_warehouse": {"plan": "resnet18", "start": "paper"},
        },
        "data": {
            "root": str(images),
            "input_size": 32,
            "workers": 1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "random_erasing": {"probability": 0.5},
        },
        "optimizer": {"name": "adamw", "lr": 0.002, "weight_decay": 0.05, "clip_grad": 1.0},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "temperature_epochs": 1,
        "epochs": 8,
        "total_batch_size": 16,
        "batch_size": 4,
        "log_interval": 3,
        "ema": {"decay": 0.5},
        "checkpoint": {"interval": 1, "updates": 1, "keep": 3},
    }


def train_process(config: dict[str, Any], work_dir: Path, rank: int, world: int, port: int) -> None:
    """One process of a run, in a fork."""
    torch.set_num_threads(1)
    os.setpgid(0, 0)  # with its loader's processes
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    launcher = "none" if world == 1 else "pytorch"
    train(config_from_mapping(config), work_dir, resume=True, launcher=launcher)


def start(config: dict[str, Any], work_dir: Path, world: int, port: int) -> list[Any]:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=train_process, args=(config, work_dir, rank, world, port))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def kill(processes: list[Any]) -> None:
    """``kill -9``, loader processes and all."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
    for process in processes:
        process.join()


def free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def run_with_kills(
    config: dict[str, Any], work_dir: Path, kills: int, world: int, seed: int, longest: float
) -> int:
    """Start, kill after a random time, resume; then let it end. Returns the kills that hit."""
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        processes = start(config, work_dir, world, free_port())
        time.sleep(draw.uniform(0.05, longest))
        hits += any(process.is_alive() for process in processes)
        kill(processes)
    processes = start(config, work_dir, world, free_port())
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return hits


def log_of(work_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def differences(one: Any, other: Any, key: str = "") -> list[str]:
    """Dotted keys at which two states are not equal to the bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for k in one for d in differences(one[k], other[k], f"{key}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{key}.{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [key]
    return [] if one == other else [key]


def compare(expected: Path, found: Path) -> list[str]:
    """What differs between the ends of two runs: checkpoint, log, results."""
    last = [load_checkpoint(d / "last.pth") for d in (expected, found)]
    different = differences(*last, key="checkpoint")
    different += differences(log_of(expected), log_of(found), "log")
    results = [json.loads((d / "results.json").read_text()) for d in (expected, found)]
    for result, directory in zip(results, (expected, found), strict=True):
        result["checkpoint"] = str(Path(result["checkpoint"]).relative_to(directory))
    best = [load_checkpoint(d / "best.pth") for d in (expected, found)]
    return different + differences(*results, key="results") + differences(*best, key="best")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=4.0, help="seconds a run may live")
    args = parser.parse_args()
    from conftest import write_images

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", "train", (16, 16, 16, 16), seed=0)
        write_images(root / "images", "val", (5, 5, 5, 4), seed=1)
        config = settings(root / "images")
        run_with_kills(config, root / "whole", 0, args.processes, args.seed, args.longest)
        hits = run_with_kills(
            config, root / "killed", args.kills, args.processes, args.seed, args.longest
        )
        different = compare(root / "whole", root / "killed")
        print(f"{args.kills} kills, {hits} of a living run; differences: {different or 'none'}")


if __name__ == "__main__":
    main()
