"""Compare finished runs: a table of model, parameters, top-1 and time, and a plot of their curves.

kw study compare work_dirs/resnet18 work_dirs/kw_resnet18_1x --plot curves.png
"""

from pathlib import Path

from ..evaluation import read_run, summary_table
from ..study.plots import plot_curves, run_curve
from .tool import ToolParser, output_file


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR")
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE", help="write the curves to FILE (PNG or SVG)"
    )
    args = parser.parse_args()
    runs = [read_run(work_dir) for work_dir in args.work_dirs]
    print(summary_table(runs))
    if args.plot is not None:
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            names = [str(work_dir) for work_dir in args.work_dirs]
        curves = [run_curve(run, name) for run, name in zip(runs, names, strict=True)]
        plot_curves(curves, "validation top-1 (%)", args.plot)
        print(f"curves: {args.plot}")
