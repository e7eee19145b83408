"""Compare finished runs: a table of model, parameters, score and time, and a plot of their curves.

kw study compare work_dirs/resnet18 work_dirs/kw_resnet18_1x --plot curves.png
"""

from pathlib import Path

from ..errors import UserError
from ..evaluation import read_run, summary_table
from ..study.plots import plot_curves, run_curve
from .tool import ToolParser, output_file

SCORES = {"top1": ("top-1 (%)", 1), "mAP": ("mAP (%)", 1), "bbox_mAP": ("box AP (%)", 100)}
"""By which a run is judged: the key in its results, its name, and the factor to percent."""


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR")
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE", help="write the curves to FILE (PNG or SVG)"
    )
    args = parser.parse_args()
    found = [read_run(work_dir, ()).results for work_dir in args.work_dirs]
    kinds = [next((key for key in SCORES if key in results), "top1") for results in found]
    score = kinds[0]
    for work_dir, kind in zip(args.work_dirs, kinds, strict=True):
        if kind != score:
            first = f"{args.work_dirs[0]} by {SCORES[score][0]}"
            raise UserError(
                f"{work_dir} is judged by {SCORES[kind][0]}, {first}: compare them apart"
            )
    name, scale = SCORES[score]
    runs = [read_run(work_dir, (score,)) for work_dir in args.work_dirs]
    print(summary_table(runs, score, name, scale))
    if args.plot is not None:
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            names = [str(work_dir) for work_dir in args.work_dirs]
        curves = [run_curve(*each, score, scale) for each in zip(runs, names, strict=True)]
        plot_curves(curves, f"validation {name}", args.plot)
        print(f"curves: {args.plot}")
