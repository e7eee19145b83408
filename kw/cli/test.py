"""Evaluate classifiers or detectors on their validation images: runs, or checkpoints of them.

kw test configs/imagenet/resnet18/kw_resnet18_1x.yaml work_dirs/.../best.pth
kw test work_dirs/kw_resnet18_1x
kw test work_dirs/resnet18 work_dirs/kw_resnet18_1x --csv results.csv
kw test configs/coco/mask_rcnn_kw_resnet50_1x.py work_dirs/.../best.pth

Classifiers also on ImageNet's other test sets, at other sizes, on several views of an image:

kw test work_dirs/kw_resnet18_1x --set c --set-root data/imagenet-c
kw test work_dirs/kw_resnet18_1x --sizes 192,224,288 --tta flip --csv results.csv
kw test work_dirs/kw_resnet18_1x --figures found

docs/evaluation.md says what each means.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..errors import valid_names
from ..runs import load_run, runs_of
from ..training.distributed import LAUNCHERS
from .tool import ToolParser, add_config_options, number, output_file, output_folder, save_json

SETS = ("real", "v2", "a", "r", "sketch", "c")
TTA = ("flip", "five", "ten")
_DETAILS = ("model_", "ce_", "error_")


def main() -> None:
    parser = ToolParser(__doc__, conflict_handler="resolve")
    add_config_options(parser)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="checkpoints or work directories; without a configuration, CONFIG is one of these",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the results to FILE"
    )
    parser.add_argument(
        "--csv", type=output_file, metavar="FILE", help="the same as a table, a row a checkpoint"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none")
    of_classes = parser.add_argument_group("of a classifier")
    of_classes.add_argument(
        "--set",
        action=_Set,
        nargs="+",
        dest="name",
        metavar="NAME",
        help=f"a set of ImageNet's other images: {', '.join(SETS)}; or KEY=VALUE, as --cfg-options",
    )
    of_classes.add_argument("--set-root", type=Path, metavar="FOLDER", help="where that set is")
    of_classes.add_argument(
        "--sizes", type=_sizes, metavar="S,S", help="sides of the input, pixels; a row for each"
    )
    of_classes.add_argument(
        "--crop-ratio", type=number(float, 0.1, 1), metavar="R", help="data.test_crop_ratio"
    )
    of_classes.add_argument(
        "--tta", choices=TTA, help="mean over views: mirrored, five crops, both"
    )
    of_classes.add_argument(
        "--figures",
        type=output_folder,
        metavar="DIR",
        help="accuracy by class, confusion matrix, mistakes, calibration",
    )
    args = parser.parse_args()
    if args.set_root is not None and args.name is None:
        parser.error(f"--set-root: of which set? --set {', '.join(SETS)}")
    results = evaluate(args, runs_of(args.config, args.checkpoints))
    if args.launcher != "none" and os.environ["RANK"] != "0":
        return
    show(results)
    if args.json is not None:
        save_json(results[0] if len(results) == 1 else results, args.json)
    if args.csv is not None:
        from ..training.figures import write_csv

        heads = list(dict.fromkeys(key for row in results for key in row))
        write_csv(args.csv, heads, [[row.get(key, "") for key in heads] for row in results])


def evaluate(args: argparse.Namespace, runs: list[tuple[Any, Path]]) -> list[dict[str, Any]]:
    """The results of each run, at each size."""
    given = [
        f"--{key.replace('_', '-')}"
        for key in ("name", "sizes", "crop_ratio", "tta", "figures")
        if getattr(args, key)
    ]
    loaded = [(*load_run(file, args.cfg_options), checkpoint) for file, checkpoint in runs]
    detectors = [task for _, task, _ in loaded if not hasattr(task, "evaluate_checkpoints")]
    if not detectors:
        from ..training import Testing, evaluate_checkpoints

        if args.name == "c" and any(
            o.startswith("data.test_crop_ratio=") for o in args.cfg_options
        ):
            raise ConfigError("--set c: give --crop-ratio in the place of data.test_crop_ratio")
        testing = Testing(
            args.name or "val", args.set_root, args.sizes or (), args.crop_ratio, args.tta,
            args.figures,
        )  # fmt: skip
        classifiers = [(config, checkpoint) for config, _, checkpoint in loaded]
        return evaluate_checkpoints(classifiers, testing, launcher=args.launcher)
    if given:
        wrong = f"--set {args.name}" if given[0] == "--name" else given[0]
        raise ConfigError(f"{wrong}: is of classifiers, and {args.config} is a detector's run")
    if len(loaded) > 1 and args.launcher != "none":
        raise ConfigError("--launcher with several detectors: evaluate one at a time")
    return [task.evaluate_checkpoint(c, f, launcher=args.launcher) for c, task, f in loaded]


def show(results: list[dict[str, Any]]) -> None:
    """One checkpoint's figures in lines, several in a table."""
    if len(results) == 1:
        for key, value in results[0].items():
            print(f"{key:12s} {_text(value)}")
        return
    from ..evaluation import render_table

    # Without single corruptions and the weights that an average was made of; --csv has them.
    first = ("checkpoint", "input_size", "crop_ratio")
    found = dict.fromkeys(key for row in results for key in row)
    heads = [key for key in first if key in found]
    heads += [key for key in found if key not in first and not key.startswith(_DETAILS)]
    print(render_table(heads, [[_text(row.get(key, "")) for key in heads] for row in results]))


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _sizes(text: str) -> list[int]:
    return [number(int, 1, 8192)(word) for word in text.split(",")]


class _Set(argparse.Action):
    """``--set`` of an evaluation set, or of settings as every other command has it."""

    def __call__(self, parser: Any, namespace: Any, words: Any, option: str | None = None) -> None:
        for word in words:
            if "=" in word:
                namespace.cfg_options = [*namespace.cfg_options, word]
            elif word in SETS and namespace.name in (None, word):
                namespace.name = word
            else:
                names = valid_names(word, SETS)
                what = "one set, or KEY=VALUE" if word in SETS else "KEY=VALUE, or a set's name"
                raise argparse.ArgumentError(self, f"{word!r}: expected {what}{names}")
