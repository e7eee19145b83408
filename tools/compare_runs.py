#!/usr/bin/env python
"""Compare finished runs: a table of model, parameters, top-1 and time, and a plot of their curves.

python tools/compare_runs.py work_dirs/resnet18 work_dirs/kw_resnet18_1x --plot curves.png
"""

import argparse
import sys
from pathlib import Path

from kw.evaluation import plot_runs, read_run, summary_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work_dirs", nargs="+", type=Path, metavar="WORK_DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves to FILE (PNG)")
    args = parser.parse_args()
    try:
        runs = [read_run(work_dir) for work_dir in args.work_dirs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(summary_table(runs))
    if args.plot is not None:
        plot_runs(runs, args.plot)
        print(f"curves: {args.plot}")


if __name__ == "__main__":
    main()
