"""Evaluate a classifier or a detector on the validation images: a run, or a checkpoint of one.

kw test configs/imagenet/resnet18/kw_resnet18_1x.yaml work_dirs/.../best.pth
kw test work_dirs/kw_resnet18_1x
kw test configs/coco/mask_rcnn_kw_resnet50_1x.py work_dirs/.../best.pth
"""

import os

from ..runs import load_run, run_of
from ..training.distributed import LAUNCHERS
from .tool import ToolParser, add_checkpoint, add_config_options, output_file, save_json

__all__ = ["main"]


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    add_checkpoint(parser)
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the results to FILE"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none")
    args = parser.parse_args()
    file, checkpoint = run_of(args.config, args.checkpoint)
    config, task = load_run(file, args.cfg_options)
    results = task.evaluate_checkpoint(config, checkpoint, launcher=args.launcher)
    if os.environ.get("RANK", "0") != "0":
        return
    for key, value in results.items():
        print(f"{key:12s} {value:.4f}" if isinstance(value, float) else f"{key:12s} {value}")
    if args.json is not None:
        save_json(results, args.json)
