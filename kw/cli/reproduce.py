"""Reproduce a published table: list its rows, train them, show published and measured together.

kw study reproduce                               # the tables
kw study reproduce imagenet_300ep                # its rows, and what became of each
kw study reproduce imagenet_300ep --run --launcher torchrun --gpus 8
kw study reproduce imagenet_300ep --collect
kw study reproduce imagenet_300ep --scale tiny --run --collect
"""

import argparse
import shlex
import sys
from pathlib import Path

from ..evaluation import paper_tables
from ..study.launch import LAUNCHERS, command_for, run_all, submit, unfinished
from ..study.published import CONFIGS, Reproduction
from ..study.report import overview, write_report
from ..study.runs import RunError
from ..study.scale import read_scale
from .tool import ToolParser, add_options, number, output_folder


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("table", nargs="?", metavar="TABLE", help="of paper_tables.yaml")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="e.g. 'kw_*_1x'")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=1, help="runs of every row")
    parser.add_argument(
        "--scale", default="full", help="full, a file of configs/scales, or a path of one"
    )
    parser.add_argument(
        "--work-dir", type=output_folder, default=Path("work_dirs/reproduce"), metavar="DIR"
    )
    add_options(parser)
    parser.add_argument("--run", action="store_true", help="train what is not done")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="with --run (default none)")
    parser.add_argument(
        "--gpus", type=number(int, 1, 4096), metavar="N", help="with torchrun or slurm: a machine's"
    )
    parser.add_argument(
        "--jobs", type=number(int, 1, 64), metavar="N", help="runs at a time, with --launcher none"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what --run would start")
    parser.add_argument("--collect", action="store_true", help="write table.txt, table.md, plots")
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR", help="with --collect (default: the table's)"
    )
    args = parser.parse_args()
    check_combination(parser, args)
    tables = paper_tables()
    if args.table is None:
        for name, table in tables.items():
            print(f"{name:30} {table.title}")
        return
    scale = read_scale(args.scale, CONFIGS / "scales")
    table = tables[args.table]
    task = Reproduction(table, scale, args.work_dir, args.seeds, tuple(args.cfg_options))
    rows = task.rows(args.rows)
    runs = [run for row in rows for run in task.runs(row)]
    status, launcher = 0, args.launcher or "none"
    if (args.run or args.dry_run) and not runs:
        raise RunError(
            f"{table.name}: there is nothing to train: the rows have no configuration"
            if table.kind != "latency"
            else f"{table.name} is not trained: kw benchmark networks measures latency"
        )
    if args.run or args.dry_run:
        data = task.prepare_data()
        runs = [task.resolve(run, data) for run in runs]
    if args.dry_run:
        waiting = [run for run, _ in unfinished(runs)]
        homes = dict.fromkeys(run.home for run in waiting)
        arrays = [[run for run in waiting if run.home == home] for home in homes]
        for group in arrays if launcher == "slurm" else [[run] for run in waiting]:
            print(shlex.join(command_for(group, launcher, args.gpus)))
    elif args.run and launcher == "slurm":
        status = submit(runs, args.gpus)
    elif args.run:
        status = run_all(runs, launcher, args.gpus, jobs=args.jobs or 1)
    if args.collect:
        for path in write_report(task, rows, args.out or task.folder):
            print(path)
    elif not (args.run or args.dry_run):
        print(overview(task, rows))
    sys.exit(status)


def check_combination(parser: ToolParser, args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    starts = args.run or args.dry_run
    for name, given in (("--launcher", args.launcher), ("--gpus", args.gpus)):
        if given is not None and not starts:
            parser.error(f"{name} has an effect with --run or --dry-run only")
    if args.gpus is not None and args.launcher in (None, "none"):
        parser.error("--gpus has an effect with --launcher torchrun or slurm only")
    if args.jobs is not None and not (args.run and args.launcher in (None, "none")):
        parser.error("--jobs has an effect with --run and --launcher none only")
    if args.out is not None and not args.collect:
        parser.error("--out has an effect with --collect only")
