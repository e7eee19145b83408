"""Print a configuration resolved, with every setting; list those that are here; explain the keys.

kw config configs/imagenet/resnet18/kw_resnet18_1x.yaml --cfg-options seed=1
kw config configs/coco/mask_rcnn_kw_resnet50_1x.py
kw config --list "*resnet50*"
kw config --reference               # of a classifier's settings
kw config --reference detection     # of a detector's
"""

import argparse
import sys
from typing import Any

from ..config import Config, reference, to_yaml
from ..config.names import config_names
from ..runs import load_run
from .tool import ToolParser, add_config_options


class _Reference(argparse.Action):
    # Like --help: answers and exits, so that CONFIG need not be given.
    def __call__(
        self, parser: argparse.ArgumentParser, _: Any, kind: Any, __: str | None = None
    ) -> None:
        if kind == "detection":
            from ..detection.schema import DetectionConfig

            sys.stdout.write(reference(DetectionConfig))
        else:
            sys.stdout.write(reference())
        parser.exit()


__all__ = ["main"]


class _List(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _: Any, pattern: Any, __: str | None = None
    ) -> None:
        for name, file in config_names(pattern or "*").items():
            print(f"{name:32s} {file}")
        parser.exit()


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument(
        "--reference",
        action=_Reference,
        nargs="?",
        choices=("classification", "detection"),
        help="print every key with its meaning, and exit",
    )
    parser.add_argument(
        "--list",
        action=_List,
        nargs="?",
        metavar="PATTERN",
        help="list the configurations that are here, by name, and exit",
    )
    args = parser.parse_args()
    config, _ = load_run(args.config, args.cfg_options)
    sys.stdout.write(to_yaml(config) if isinstance(config, Config) else config.to_python())
