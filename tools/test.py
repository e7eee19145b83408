#!/usr/bin/env python
"""Evaluate a checkpoint of a classifier or a detector on the validation images.

python tools/test.py configs/imagenet/resnet18/kw_resnet18_1x.yaml work_dirs/.../best.pth
python tools/test.py configs/coco/mask_rcnn_kw_resnet50_1x.py work_dirs/.../best.pth
"""

import os

from kw.cli import ToolParser, add_config_options, load_run, output_file, run_tool, save_json
from kw.training.distributed import LAUNCHERS


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file that train.py wrote")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the results to FILE"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none")
    args = parser.parse_args()
    config, task = load_run(args.config, args.cfg_options)
    results = task.evaluate_checkpoint(config, args.checkpoint, launcher=args.launcher)
    if os.environ.get("RANK", "0") != "0":
        return
    for key, value in results.items():
        print(f"{key:12s} {value:.4f}" if isinstance(value, float) else f"{key:12s} {value}")
    if args.json is not None:
        save_json(results, args.json)


if __name__ == "__main__":
    run_tool(main)
