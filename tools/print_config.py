#!/usr/bin/env python
"""Check a configuration and print it resolved, with every setting.

python tools/print_config.py configs/imagenet/resnet18/kw_resnet18_1x.yaml --cfg-options seed=1
python tools/print_config.py configs/coco/mask_rcnn_kw_resnet50_1x.py
python tools/print_config.py --reference               # of a classifier's settings
python tools/print_config.py --reference detection     # of a detector's
"""

import argparse
import sys
from typing import Any

from kw.cli import ToolParser, add_config_options, load_run, run_tool
from kw.config import Config, reference, to_yaml


class _Reference(argparse.Action):
    # Like --help: answers and exits, so that CONFIG need not be given.
    def __call__(
        self, parser: argparse.ArgumentParser, _: Any, kind: Any, __: str | None = None
    ) -> None:
        if kind == "detection":
            from kw.detection.schema import DetectionConfig

            sys.stdout.write(reference(DetectionConfig))
        else:
            sys.stdout.write(reference())
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
    args = parser.parse_args()
    config, _ = load_run(args.config, args.cfg_options)
    sys.stdout.write(to_yaml(config) if isinstance(config, Config) else config.to_python())


if __name__ == "__main__":
    run_tool(main)
