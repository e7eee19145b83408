#!/usr/bin/env python
"""Write the part of a COCO-format annotation file that is about its first images.

python scripts/subset_coco.py annotations/instances_train2017.json first_8.json --images 8
"""

from kw.cli import ToolParser, number, output_file, run_tool
from kw.detection.sets import write_subset


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("source", metavar="ANNOTATIONS", help="annotation file in COCO's format")
    parser.add_argument(
        "target", type=output_file, metavar="TARGET", help="annotation file to write"
    )
    parser.add_argument(
        "--images", type=number(int, 1), required=True, help="number of images with objects"
    )
    args = parser.parse_args()
    part = write_subset(args.source, args.target, args.images)
    print(f"{args.target}: {len(part['images'])} images, {len(part['annotations'])} objects")


if __name__ == "__main__":
    run_tool(main)
