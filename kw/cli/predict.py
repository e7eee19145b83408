"""Classify images, or find objects in them, with a trained model: files and folders of them.

kw predict kw_resnet18_1x.onnx cat.jpg photos/ --top 5 --json predictions.json
kw predict work_dirs/mine photos/ --score 0.3 --pictures found --json found.json
kw predict work_dirs/mine test2017/ --annotations image_info_test-dev2017.json \\
    --json results.json

MODEL is a work directory or checkpoint of kw train, or a file of kw export. Files that
cannot be read are skipped and listed at the end; the status is 2 only if none could be read.

A detector's --json is an annotation file in COCO's format whose annotations have scores; with
--annotations it is COCO's results format, with the ids of that file, which needs no annotations.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.reading import BadImageError, DataError
from ..deploy import Classifier, find_images, load, predict_files
from ..errors import OutOfMemory
from ..evaluation import render_table
from ..training.trained import WEIGHTS
from .tool import ToolParser, device, number, output_file, output_folder, save_json

if TYPE_CHECKING:
    from ..objects.found import Detector


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="work directory, folder of kw pull, .pth, .safetensors, .onnx, .xml, .pte, .pt2, or "
        "hf-hub:user/model; .pt2, .pte and a detector's config.py are programs",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files and folders")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write results to FILE")
    parser.add_argument("--weights", choices=WEIGHTS, help="of a checkpoint (auto)")
    of_classes = parser.add_argument_group("of a classifier")
    of_classes.add_argument("--top", type=number(int, 1), metavar="K", help="classes each (5)")
    of_classes.add_argument("--batch-size", type=number(int, 1, 65536), metavar="N", help="(32)")
    of_objects = parser.add_argument_group("of a detector")
    of_objects.add_argument(
        "--score",
        type=number(float, 0, 1),
        help="leave out detections below this score (0.3; in results for --annotations, none)",
    )
    of_objects.add_argument(
        "--out",
        "--pictures",
        dest="pictures",
        type=output_folder,
        metavar="DIR",
        help="draw the detections into DIR",
    )
    of_objects.add_argument(
        "--annotations",
        metavar="FILE",
        help="annotation file with the names of the images in the folder IMAGES",
    )
    args = parser.parse_args()
    for path in args.images:
        if not Path(path).exists():
            raise DataError(f"{path}: no such file or folder")
    model = load(args.model, args.device, args.weights or "auto")
    is_classifier = isinstance(model, Classifier)
    foreign = ("score", "pictures", "annotations") if is_classifier else ("top", "batch_size")
    for name in foreign:
        if getattr(args, name) is not None:
            kind = "not a detector" if is_classifier else "a detector"
            parser.error(f"--{name.replace('_', '-')}: {args.model} is {kind}")
    if isinstance(model, Classifier):
        classify(args, model)
    else:
        find_objects(args, model)


def classify(args: argparse.Namespace, classifier: Classifier) -> None:
    files = find_images(args.images)
    results = list(predict_files(classifier, files, args.top or 5, args.batch_size or 32))
    rows = [
        (result.file if place == 0 else "", best.name, f"{100 * best.probability:.2f}")
        for result in results
        for place, best in enumerate(result.predictions)
    ]
    if rows:
        print(render_table(("file", "class", "%"), rows))
    unreadable = [(result.file, result.reason) for result in results if result.reason]
    if args.json is not None:
        images = [
            {"file": result.file, "predictions": [best._asdict() for best in result.predictions]}
            for result in results
            if not result.reason
        ]
        faults = [{"file": file, "reason": reason} for file, reason in unreadable]
        save_json({"model": args.model, "images": images, "unreadable": faults}, args.json)
    _tell_unreadable(unreadable, len(results))


def find_objects(args: argparse.Namespace, detector: Detector) -> None:
    from ..detection.annotations import load_annotations
    from ..detection.pictures import picture_names, refuse_overwriting, save_picture
    from ..detection.sets import result_ids
    from ..objects.found import coco_file, coco_results

    shown = score = 0.3 if args.score is None else args.score
    if args.annotations is not None and args.score is None:
        score = 0.0  # for evaluation, of which any detection that is left out lowers the figures
    content, ids, categories = None, [], []
    if args.annotations is not None:
        content = load_annotations(args.annotations, ("images", "categories"))
        files = _listed(args, content)
        ids = [image["id"] for image in content["images"]]
        categories = result_ids(detector.classes, content, args.annotations)
    else:
        files = _found(args.images)
    names = picture_names([name for _, name in files])
    if args.pictures is not None:
        folders = [path for path in map(Path, args.images) if path.is_dir()]
        refuse_overwriting(args.pictures, names, [file for file, _ in files], folders)
    unreadable: list[tuple[str, str]] = []
    found: list[tuple[Any, Any]] = []  # by image id, or by file name
    rows = []
    for place, ((file, name), picture) in enumerate(zip(files, names, strict=True)):
        try:
            each = detector.predict(file, score)
        except (BadImageError, OutOfMemory) as error:
            reason = error.reason if isinstance(error, BadImageError) else str(error)
            unreadable.append((str(file), reason))
            continue
        found.append((name if content is None else ids[place], each))
        counts = [each.labels.tolist().count(label) for label in range(len(detector.classes))]
        named = [f"{n} {c}" for n, c in zip(counts, detector.classes, strict=True) if n]
        rows.append((str(file), ", ".join(named) or "nothing"))
        if args.pictures is not None:
            save_picture(detector.draw(file, each, shown), args.pictures / picture)
    if rows:
        print(render_table(("file", f"objects, score {score:g} and above"), rows))
    if args.json is not None:
        if content is None:
            save_json(coco_file(found, detector.classes), args.json)
        else:
            save_json(coco_results(found, categories), args.json)
    _tell_unreadable(unreadable, len(files))


def _found(paths: list[str]) -> list[tuple[Path, str]]:
    """Files, and their names below the common folder of all paths."""
    given = [Path(os.path.abspath(path)) for path in paths]  # without ".."
    root = os.path.commonpath([path if path.is_dir() else path.parent for path in given])
    files = {Path(os.path.abspath(file)): file for file in find_images(paths)}
    return [(file, place.relative_to(root).as_posix()) for place, file in files.items()]


def _listed(args: argparse.Namespace, content: dict[str, Any]) -> list[tuple[Path, str]]:
    """The files of an annotation file, and their names there."""
    if len(args.images) != 1 or not Path(args.images[0]).is_dir():
        raise DataError("--annotations: expected one folder as IMAGES")
    seen: set[int] = set()
    for image in content["images"]:
        name, number = image.get("file_name"), image.get("id")
        if type(number) is not int or number in seen or not (isinstance(name, str) and name):
            what = "needs a file_name and an id, a whole number that no other has"
            raise DataError(f"{args.annotations}: image {image} {what}")
        seen.add(number)
    return [(Path(args.images[0], i["file_name"]), i["file_name"]) for i in content["images"]]


def _tell_unreadable(unreadable: list[tuple[str, str]], of: int) -> None:
    for file, reason in unreadable:
        print(f"cannot read {file}: {reason}", file=sys.stderr)
    if len(unreadable) == of:
        raise DataError(f"none of {of} file(s) could be read as an image")
