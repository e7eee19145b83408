"""Export a trained classifier: ONNX, OpenVINO, ExecuTorch, torch.export, safetensors; verified.

kw export configs/imagenet/resnet18/kw_resnet18_1x.yaml work_dirs/.../best.pth \
    kw_resnet18_1x.onnx kw_resnet18_1x.pt2 kw_resnet18_1x.safetensors --images data/imagenet/val

The name's end decides the format. Batch and image size are open where the network allows it, and
the temperature is folded to 0. A model card is written beside every file (docs/deployment.md).
"""

import sys
from pathlib import Path

from ..deploy import export, find_images, read_source
from ..deploy.export import Options, check_target, read_some
from ..deploy.quantize import CALIBRATION
from ..runs import run_of
from ..training.trained import WEIGHTS
from .tool import ToolParser, add_config_options, number, output_file

__all__ = ["main"]


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
    args = parser.parse_args()
    if Path(args.config).is_dir() or args.config.endswith(".pth"):
        args.targets = [output_file(args.checkpoint), *args.targets]
        args.checkpoint = None
    if not args.targets:
        parser.error("the following arguments are required: TARGET")
    args.config, args.checkpoint = run_of(args.config, args.checkpoint)
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
        for note in written.notes:
            print(f"note: {note}", file=sys.stderr)
        megabytes = written.path.stat().st_size / 1e6
        print(f"wrote {written.path} ({megabytes:.2f} MB, {written.seconds:.1f} s) and its card")
        for kind, found in (("random", written.random), ("real", written.real)):
            if found is not None:
                print(
                    f"  {found.images} {kind} images: largest difference {found.largest:.1e}, "
                    f"same class {found.same}"
                )
