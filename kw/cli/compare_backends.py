"""Train with every back end from one start on the same batches, and compare the loss curves.

kw benchmark backends --steps 200 --dtype float32 bfloat16 --json curves.json

Rounding alone makes curves drift apart: read each back end's distance from the reference beside
that of ``grouped``, which is ordinary code.
"""

import dataclasses

import torch

from ..benchmark import DTYPES
from ..benchmark.cases import check_backends
from ..benchmark.curves import MODELS, CurveSettings, compare, deviations, output_errors
from ..evaluation import render_table
from ..warehouse.ops import BACKENDS
from .tool import ToolParser, device, number, output_file, precision, save_json

__all__ = ["main"]


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--backends", nargs="+", default=[*BACKENDS, "auto"], metavar="NAME")
    parser.add_argument(
        "--precision",
        "--dtype",
        dest="dtype",
        nargs="+",
        type=precision,
        choices=(*DTYPES, "float64"),
        default=["float32", "bfloat16"],
    )
    parser.add_argument("--steps", type=number(int, 1), default=200, help="optimizer updates")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write curves and distances"
    )
    args = parser.parse_args()
    check_backends(args.backends)

    report = []
    for model in args.models:
        for dtype in args.dtype:
            settings = CurveSettings(steps=args.steps, model=model)
            curves = compare(args.backends, settings, getattr(torch, dtype), args.device)
            found = deviations(curves)
            reference = curves["reference"]
            print(
                f"{model}, {dtype}, {args.device}: reference loss {reference[0]:.4f} -> "
                f"{sum(reference[-10:]) / len(reference[-10:]):.4f}"
            )
            header = ("back end", "after 1 update", "mean", "worst", "last tenth")
            rows = [
                (name, *(f"{v:.1e}" for v in dataclasses.astuple(d))) for name, d in found.items()
            ]
            print(render_table(header, rows), flush=True)
            report.append(
                {
                    "settings": dataclasses.asdict(settings),
                    "dtype": dtype,
                    "device": args.device,
                    "curves": curves,
                    "deviations": {k: dataclasses.asdict(d) for k, d in found.items()},
                }
            )
        errors = output_errors(CurveSettings(steps=args.steps, model=model), args.device)
        print(f"{model}, logits after training, relative error against float64:")
        rows = [(name, f"{error:.1e}") for name, error in errors.items()]
        print(render_table(("precision", "error"), rows), flush=True)
        report.append({"model": model, "device": args.device, "output_errors": errors})
    if args.json is not None:
        save_json(report, args.json)
