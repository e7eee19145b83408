"""Accuracy, agreement, size and speed of a model's files, on labelled images, on the CPU.

kw benchmark exports data/imagenet best.pth kw_resnet18_1x.onnx kw_resnet18_1x_int8.onnx

The first file is what the others are compared with.
"""

from ..deploy.comparison import compare_files
from ..evaluation import render_table
from .tool import ToolParser, number, output_file, save_json


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("root", metavar="DATA", help="a folder with val/<class>/*")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as for kw predict")
    parser.add_argument("--batch-size", type=number(int, 1, 65536), default=32, metavar="N")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write results to FILE")
    args = parser.parse_args()
    rows = compare_files(args.models, args.root, batch_size=args.batch_size)
    header = ("file", "top-1 %", "top-5 %", "same class %", "largest difference", "MB")
    cells = [
        (
            row["file"],
            *(f"{row[key]:.2f}" for key in ("top1", "top5", "same")),
            f"{row['difference']:.1e}",
            *(f"{each:.2f}" for each in (row["megabytes"], *row["milliseconds"])),
        )
        for row in rows
    ]
    print(render_table((*header, "ms an image, batch 1", "batch 8"), cells))
    if args.json is not None:
        save_json(rows, args.json)
