"""Pictures of what a network does.

docs/visualizing.md shows and explains every kind.

kw visualize attention work_dirs/kw_resnet18_1x --out attention.png
kw visualize attention configs/imagenet/resnet18/kw_resnet18_1x.yaml best.pth --out attention.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..evaluation import render_table
from ..pictures.method import draw_mixing, draw_partition
from ..pictures.style import check_output, save
from ..registry import takes
from ..runs import is_run, load_run, run_of
from ..training import network_pictures, run_pictures
from .tool import ToolParser, add_config_options, add_options, number, output_file, output_folder

NETWORK: dict[str, tuple[Callable[..., Any], str]] = {
    "attention": (network_pictures.picture_attention, "coefficients per layer as heat maps"),
    "cells": (network_pictures.picture_cells, "which cells the layers use, their own or others'"),
    "kernels": (network_pictures.picture_kernels, "the kernels that two images get"),
    "cam": (network_pictures.picture_cam, "class-activation maps on images"),
}
"""Pictures of a trained classifier: who draws them, from the options that it has arguments for."""


def main() -> None:
    parser = ToolParser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)

    def kind(name: str, draw: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text)
        added.set_defaults(draw=draw)
        return added

    def of_run(name: str, draw: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
        added = kind(name, draw, text)
        add_config_options(added)
        added.add_argument(
            "checkpoint",
            nargs="?",
            metavar="CHECKPOINT",
            help="a checkpoint, work directory or hf-hub: name; without it, CONFIG is one of these",
        )
        return added

    network = {name: of_run(name, draw_network, text) for name, (_, text) in NETWORK.items()}
    history = kind("history", draw_history, "coefficients over training")
    history.add_argument("work_dir", type=Path, metavar="WORK_DIR")
    add_options(history)
    history.add_argument(
        "--warehouse", metavar="NAME", help="the one whose maps are drawn (the first)"
    )
    for name, expected in (("kernels", "two"), ("cam", "one or more")):
        network[name].add_argument("image_files", nargs="*", metavar="IMAGE", help=expected)
    for name in ("attention", "cells", "kernels"):
        network[name].add_argument(
            "--layers",
            metavar="REGEX",
            help="only layers whose whole name it matches, e.g. 'layer1.*conv2'",
        )
    for name, count in (("attention", 64), ("cells", 64), ("history", 32)):
        said = f"test images, evenly over the set ({count})"
        kinds.choices[name].add_argument(
            "--images", type=number(int, 1, 10**5), default=count, help=said
        )
    network["attention"].add_argument(
        "--over",
        choices=("images", "classes"),
        default="images",
        help="the mean over images, or how classes differ from it (images)",
    )
    network["attention"].add_argument(
        "--classes",
        type=number(int, 2, 100),
        default=10,
        help="with --over classes: the first so many (10)",
    )
    batches = kind("batches", draw_batch, "a batch as training sees it")
    add_config_options(batches)
    for name, text in (("epoch", "epoch, from 1 (1)"), ("update", "update of the epoch (1)")):
        batches.add_argument(f"--{name}", type=number(int, 1, 10**9), default=1, help=text)
    schedules = "learning rate, decay and temperature, before a run"
    add_config_options(kind("schedules", draw_schedules, schedules))
    kind("partition", draw_method, "the method: kernels, blocks, cells")
    kind("mixing", draw_method, "the method: coefficients, temperature, a kernel")
    for name, added in kinds.choices.items():
        example = f"the picture, e.g. {name}.png (or .svg, .pdf)"
        added.add_argument("--out", type=output_file, required=True, metavar="FILE", help=example)
    detections = of_run(
        "detections", draw_detections, "a detector's results beside the annotations"
    )
    detections.add_argument("--out", type=output_folder, required=True, metavar="DIR")
    detections.add_argument(
        "--images",
        type=number(int, 1),
        default=12,
        help="number of pictures, of the first test images (12)",
    )
    detections.add_argument(
        "--score",
        type=number(float, 0, 1),
        default=0.5,
        help="leave out detections below this score (0.5)",
    )
    args = parser.parse_args()
    if "config" in args:
        find_run(args)
    count = len(getattr(args, "image_files", ()))
    if (args.kind == "kernels" and count != 2) or (args.kind == "cam" and not count):
        expected = "IMAGE IMAGE" if args.kind == "kernels" else "IMAGE"
        parser.error(f"the following arguments are required: {expected} (got {count})")
    if args.kind == "detections":
        draw_detections(args)
        return
    check_output(args.out)
    args.draw(args)
    print(args.out)


def find_run(args: argparse.Namespace) -> None:
    """Put configuration and checkpoint in the place of a run, which is named alone."""
    checkpoint = getattr(args, "checkpoint", None)
    alone = is_run(args.config)
    if alone and checkpoint is not None and "image_files" in args:
        args.image_files.insert(0, checkpoint)
        checkpoint = None
    if alone or "checkpoint" in args:
        args.config, args.checkpoint = run_of(args.config, checkpoint)


def classifier(args: argparse.Namespace) -> Any:
    """The configuration, which must be a classifier's."""
    config, task = load_run(args.config, args.cfg_options)
    if hasattr(task, "write_pictures"):
        raise ConfigError(f"{args.config}: expected a classifier's configuration (YAML)")
    return config


def draw_network(args: argparse.Namespace) -> None:
    picture, _ = NETWORK[args.kind]
    if getattr(args, "over", None) == "classes":
        picture = network_pictures.picture_classes
    given = {**vars(args), "config": classifier(args)}
    found = picture(**{name: value for name, value in given.items() if takes(picture, name)})
    if found is not None:
        header = ("layer", "mixtures", "cells", "own", "others", "negative", "variation")
        rows = [(x.layer, *map(str, x[1:3]), *(f"{value:.3f}" for value in x[3:])) for x in found]
        print(render_table(header, rows))


def draw_history(args: argparse.Namespace) -> None:
    options = {"options": args.cfg_options, "warehouse": args.warehouse, "images": args.images}
    network_pictures.picture_history(args.work_dir, args.out, **options)


def draw_batch(args: argparse.Namespace) -> None:
    run_pictures.picture_batch(classifier(args), args.out, epoch=args.epoch, update=args.update)


def draw_schedules(args: argparse.Namespace) -> None:
    config, task = load_run(args.config, args.cfg_options)
    run = config.run if hasattr(task, "write_pictures") else config
    file = Path(args.config).absolute()
    title = file.parent.name if file.stem == "config" else file.stem
    run_pictures.picture_schedules(run, args.out, title=title)


def draw_method(args: argparse.Namespace) -> None:
    save(draw_partition() if args.kind == "partition" else draw_mixing(), args.out)


def draw_detections(args: argparse.Namespace) -> None:
    config, task = load_run(args.config, args.cfg_options)
    write: Any = getattr(task, "write_pictures", None)
    if write is None:
        raise ConfigError(f"{args.config}: expected a detector's configuration (Python)")
    written = write(config, args.checkpoint, args.out, args.images, args.score)
    print(f"{len(written)} pictures in {args.out}")
