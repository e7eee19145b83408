"""Export a trained classifier or detector to ONNX, OpenVINO, ExecuTorch and others; verified.

kw export work_dirs/mask_rcnn_kw_resnet50_1x mask_rcnn.onnx
kw export configs/imagenet/resnet18/kw_resnet18_1x.yaml work_dirs/.../best.pth \\
    kw_resnet18_1x.onnx kw_resnet18_1x.pt2 kw_resnet18_1x.safetensors --images data/imagenet/val

The name's end decides the format. Batch and image size are open where the network allows it, and
the temperature is folded to 0. A model card is written beside every file (docs/deployment.md).
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.names import config_file, name_of_config
from ..deploy import ExportError, export, find_images, read_source
from ..deploy.export import Options, check_target, read_some
from ..deploy.quantize import CALIBRATION
from ..runs import is_run, run_of
from ..training.trained import WEIGHTS
from .tool import ToolParser, add_config_options, number, output_file


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file that training wrote")
    parser.add_argument(
        "targets",
        nargs="*",
        type=output_file,
        metavar="TARGET",
        help="files to write: NAME.onnx, .xml, .pte, .pt2, .safetensors",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="PATH",
        help="images or folders of them to verify with; int8 is calibrated on them",
    )
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8"), default="fp32")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="default: auto, the moving average where there is one",
    )
    parser.add_argument(
        "--batch", type=number(int, 1, 4096), metavar="N", help="fix the number of images"
    )
    parser.add_argument("--fixed-size", action="store_true", help="fix the size to data.input_size")
    parser.add_argument(
        "--nms",
        action=argparse.BooleanOptionalAction,
        help="of a detector: suppress boxes (default), or give the candidates before suppression",
    )
    args = parser.parse_args()
    if is_run(args.config):
        try:
            args.targets.insert(0, output_file(args.checkpoint))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument TARGET: {error}")
        args.checkpoint = None
    if not args.targets:
        parser.error("the following arguments are required: TARGET")
    config, args.checkpoint = run_of(args.config, args.checkpoint)
    args.config = config_file(config)
    if args.config.suffix == ".py":
        export_detectors(args)
        return
    if args.nms is not None:
        parser.error("--nms: is of detectors (a configuration that ends with .py)")
    options = Options(args.precision, args.batch, args.fixed_size)
    for target in args.targets:
        check_target(target, options)
    source = read_source(args.checkpoint, args.config, args.cfg_options, args.weights)
    count = max(CALIBRATION, args.batch or 1)
    images = read_some(source, iter(find_images(args.images)), count) if args.images else []
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    for target in args.targets:
        written = export(source, target, options, images)
        say_written(written)
        for kind, found in (("random", written.random), ("real", written.real)):
            if found is not None:
                print(
                    f"  {found.images} {kind} images: largest difference {found.largest:.1e}, "
                    f"same class {found.same}"
                )


def export_detectors(args: argparse.Namespace) -> None:
    try:
        from ..detection.config import load_detector_config
        from ..detection.export import export_detector
        from ..detection.predictor import Predictor
    except ImportError as error:
        raise ConfigError(f"{args.config}: a detector's configuration: {error}") from error
    if args.precision != "fp32" or args.batch not in (None, 1):
        raise ExportError(
            "--precision, --batch: detectors are exported in fp32 for one picture at a time, over "
            "whose padding alone their attention pools; leave the options out"
        )
    config = load_detector_config(args.config, args.cfg_options)
    predictor = Predictor(config, args.checkpoint, weights=args.weights)
    data = config.run.data
    shown = args.images or [str(Path(data.root, data.val_images))]
    if not args.images and not Path(shown[0]).is_dir():
        raise ExportError(f"{shown[0]}: no such folder; name pictures to verify with by --images")
    name = name_of_config(args.config)
    for target in args.targets:
        files = islice(find_images(shown), 100)  # some may show nothing
        written = export_detector(
            predictor, name, target, files, args.nms is not False, args.fixed_size
        )
        say_written(written)
        print(f"  {written.agreement}")


def say_written(written: Any) -> None:
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    megabytes = written.path.stat().st_size / 1e6
    print(f"wrote {written.path} ({megabytes:.2f} MB, {written.seconds:.1f} s) and its card")
