"""Check annotated images in COCO's format before training, and list all problems.

kw inspect annotations configs/coco/mask_rcnn_kw_resnet50_1x.py --cfg-options data.root=my_set
kw inspect annotations annotations/instances_train2017.json train2017 \\
    annotations/instances_val2017.json val2017 --json problems.json

A detector's configuration names its two sets, and how they are read. With files, the first set is
for training; the others are for testing and should not have its images. Exit status: 0 without
errors (there may be warnings), otherwise 2.
"""

import argparse
from collections.abc import Iterator

from ..config.names import config_file
from ..data import DataError
from ..detection.annotations import check_annotations
from ..detection.findings import Report
from ..detection.sets import check_sets
from ..runs import load_run
from .tool import ToolParser, add_options, output_file, save_json


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "sets",
        nargs="+",
        metavar="CONFIG | ANNOTATIONS IMAGES_DIR",
        help="a detector's configuration; or an annotation file and the folder of its images, "
        "further pairs may follow",
    )
    add_options(parser)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the list to FILE")
    parser.add_argument("--no-masks", action="store_true", help="boxes only: masks may be missing")
    parser.add_argument(
        "--read-images", action="store_true", help="decode all images, which finds damaged ones"
    )
    args = parser.parse_args()
    reports: list[Report] = []
    for report in _check(parser, args):
        print(report.render(), flush=True)
        reports.append(report)
    if args.json is not None:
        save_json([report.to_dict() for report in reports], args.json)
    wrong = [report.annotations_file for report in reports if report.errors]
    if wrong:
        raise DataError(f"errors in {', '.join(wrong)}: listed above")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[Report]:
    if len(args.sets) == 1 and config_file(args.sets[0]).suffix == ".py":
        config, _ = load_run(args.sets[0], args.cfg_options)
        masks = config.reads_masks and not args.no_masks
        yield from check_sets(config.run.data, masks, args.read_images)
        return
    if len(args.sets) % 2:
        parser.error(f"expected pairs of ANNOTATIONS and IMAGES_DIR, got {len(args.sets)} paths")
    first: Report | None = None
    for file, folder in zip(args.sets[::2], args.sets[1::2], strict=True):
        report = check_annotations(
            file,
            folder,
            masks=not args.no_masks,
            read_images=args.read_images,
            other=first,
            training=first is None,
        )
        first = first or report
        yield report
