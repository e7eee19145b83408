#!/usr/bin/env python
"""Check annotated images in COCO's format before training: lists all that is wrong.

python tools/check_coco.py annotations/instances_train2017.json train2017 \\
    annotations/instances_val2017.json val2017 --json problems.json

Every further set is also compared with the first, whose images it should not share. Exit status: 0
if there are no errors (there may be warnings), else 2.
"""

import argparse
from pathlib import Path

from kw.cli import run_tool
from kw.data import DataError
from kw.detection.annotations import check_annotations
from kw.detection.findings import Report
from kw.engine.hooks.checkpoint import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sets",
        nargs="+",
        metavar="ANNOTATIONS IMAGES_DIR",
        help="annotation file and folder of its images; further pairs may follow",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the list to FILE")
    parser.add_argument("--no-masks", action="store_true", help="boxes only: masks may be missing")
    parser.add_argument(
        "--read-images", action="store_true", help="decode all images, which finds damaged ones"
    )
    args = parser.parse_args()
    if len(args.sets) % 2:
        parser.error(f"expected pairs of ANNOTATIONS and IMAGES_DIR, got {len(args.sets)} paths")
    reports: list[Report] = []
    for file, folder in zip(args.sets[::2], args.sets[1::2], strict=True):
        report = check_annotations(
            file,
            folder,
            masks=not args.no_masks,
            read_images=args.read_images,
            other=reports[0] if reports else None,
        )
        print(report.render(), flush=True)
        reports.append(report)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json([report.to_dict() for report in reports], args.json)
    wrong = [report.annotations_file for report in reports if report.errors]
    if wrong:
        raise DataError(f"errors in {', '.join(wrong)}: listed above")


if __name__ == "__main__":
    run_tool(main)
