#!/usr/bin/env python
"""Classify image files and folders of them with a trained model.

python tools/predict.py kw_resnet18_1x.onnx cat.jpg photos/ --top 5 --json predictions.json

MODEL is a work directory or checkpoint of tools/train.py, or a file of tools/export.py. Files that
cannot be read are passed over and listed at the end; the status is 2 only if none could be read.
"""

import argparse
import sys

from kw.cli import ToolParser, device, number, output_file, run_tool, save_json
from kw.data.reading import DataError
from kw.deploy import find_images, load, predict_files
from kw.deploy.source import WEIGHTS
from kw.evaluation import render_table


def main() -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="work directory, .pth, .safetensors, .onnx or .pt2 (a program: trust it like one)",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files and folders")
    parser.add_argument("--top", type=number(int, 1), default=5, metavar="K", help="classes each")
    parser.add_argument("--batch-size", type=number(int, 1, 65536), default=32, metavar="N")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="of a checkpoint")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write results to FILE")
    args = parser.parse_args()
    files = find_images(args.images)
    classifier = load(args.model, args.device, args.weights)
    results = list(predict_files(classifier, files, args.top, args.batch_size))
    rows = [
        (result.file if place == 0 else "", best.name, f"{100 * best.probability:.2f}")
        for result in results
        for place, best in enumerate(result.predictions)
    ]
    if rows:
        print(render_table(("file", "class", "%"), rows))
    unreadable = [result for result in results if result.reason]
    for result in unreadable:
        print(f"cannot read {result.file}: {result.reason}", file=sys.stderr)
    if args.json is not None:
        images = [
            {"file": result.file, "predictions": [best._asdict() for best in result.predictions]}
            for result in results
            if not result.reason
        ]
        faults = [{"file": result.file, "reason": result.reason} for result in unreadable]
        save_json({"model": args.model, "images": images, "unreadable": faults}, args.json)
    if len(unreadable) == len(results):
        raise DataError(f"none of {len(results)} file(s) could be read as an image")


if __name__ == "__main__":
    run_tool(main)
