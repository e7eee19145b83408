#!/usr/bin/env python
"""Pictures of what a network does.

python tools/visualize.py detections configs/demo/mask_rcnn_kw_resnet18_1x.py \\
    work_dirs/demo/mask_rcnn_kw_resnet18_1x/best.pth --out pictures
"""

from kw.cli import ToolParser, add_config_options, load_run, number, output_folder, run_tool
from kw.config import ConfigError


def main() -> None:
    parser = ToolParser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    detections = kinds.add_parser(
        "detections", help="a detector's boxes and masks beside the annotated ones"
    )
    add_config_options(detections)
    detections.add_argument("checkpoint", metavar="CHECKPOINT", help="a file that train.py wrote")
    detections.add_argument("--out", type=output_folder, required=True, metavar="DIR")
    detections.add_argument(
        "--images", type=number(int, 1), default=12, help="the first so many test images (12)"
    )
    detections.add_argument(
        "--score",
        type=number(float, 0, 1),
        default=0.5,
        help="leave out detections below this score (0.5)",
    )
    args = parser.parse_args()
    config, task = load_run(args.config, args.cfg_options)
    if not hasattr(task, "write_pictures"):
        raise ConfigError(f"{args.config}: expected a detector's configuration (Python)")
    written = task.write_pictures(config, args.checkpoint, args.out, args.images, args.score)
    print(f"{len(written)} pictures in {args.out}")


if __name__ == "__main__":
    run_tool(main)
