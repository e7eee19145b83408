"""Gather the finished runs of a study in one file, and plot their curves.

kw study summarize configs/tiny_imagenet/tiny_imagenet_cpu.yaml --plot curves.svg
"""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..study.files import load_study
from ..study.runs import find_state
from ..study.summary import (
    describe_study,
    join_earlier,
    plot_study,
    read_earlier,
    read_started,
    study_table,
    summarise_run,
)
from .tool import ToolParser, output_file, save_json

RESULTS = Path(__file__).parents[2] / "docs/results"


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("study", metavar="STUDY", help="a study, see configs/tiny_imagenet")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="of the runs; default: work_dirs/STUDY's name"
    )
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="default: in docs/results of a checkout, else in --work-dir",
    )
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE", help="write the curves to FILE (SVG or PNG)"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="FILE",
        help="a summary of runs that lie elsewhere, such as on another machine: they are added",
    )
    args = parser.parse_args()
    study = load_study(args.study, home=args.work_dir)
    ended = [run for run in study.runs if find_state(run).kind == "done"]
    if not ended:
        raise UserError(
            f"--work-dir {study.home}: none of {len(study.runs)} runs of the study ended"
        )
    runs = [summarise_run(run.work_dir, run.row, run.seed) for run in ended]
    missing = [run.name for run in study.runs if run not in ended]
    summary: dict[str, Any] = {
        "study": study.name,
        **read_started(study.home),
        "options": list(study.options),
        "images": runs[0]["images"],
        "missing": missing,
        "runs": runs,
    }
    if args.earlier is not None:
        summary = join_earlier(summary, read_earlier(args.earlier, study), study)
        missing = summary["missing"]
    into = RESULTS if RESULTS.is_dir() else study.home  # an installed package has no docs
    save_json(summary, args.json or into / f"{study.name}.json")
    print(f"{describe_study(summary)}\n\n{study_table(summary)}")
    if missing:
        print(f"without an end: {', '.join(missing)}")
    if args.plot is not None:
        plot_study(summary, args.plot)
        print(f"curves: {args.plot}")
