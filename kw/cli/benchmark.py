"""Measure what dynamic networks cost beside the static one: time, training step, peak memory.

kw benchmark networks configs/imagenet/resnet18/kw_resnet18_4x.yaml --threads 2 --batch-size 8
kw benchmark networks --layer in=512,out=512,size=7,ratio=4 --mode inference train
kw benchmark networks --standard                   # this machine's set -> docs/benchmarks*
kw benchmark networks --render docs/benchmarks     # tables and plots again, from the JSON files

The static network and the back end "grouped" are measured in every run, interleaved with the back
ends asked for. docs/benchmarks.md says what is counted.
"""

import argparse
import itertools
from pathlib import Path

import torch

from ..benchmark import (
    DTYPES,
    MODES,
    BenchmarkError,
    Case,
    Conditions,
    load_cases,
    read_results,
    render_page,
    run_case,
    standard_runs,
    table_of,
    write_result,
)
from ..benchmark.machine import describe_code
from ..benchmark.page import describe, targets_table
from .tool import ToolParser, number, output_folder, precision


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("configs", nargs="*", metavar="CONFIG", help="of converted networks (YAML)")
    what.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a convolution: in, out, size; kernel (3), stride, padding, groups, ratio, share (how "
        "many such layers share its warehouse)",
    )
    what.add_argument(
        "--standard",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="this machine's set instead, or those of its runs whose names match",
    )
    what.add_argument(
        "--render",
        type=Path,
        metavar="DIR",
        help="measure nothing: plots in DIR and tables in DIR.md from the results in DIR",
    )
    how = parser.add_argument_group(
        "conditions", "--standard has its own, and takes back ends and threads from here"
    )
    how.add_argument("--mode", nargs="+", choices=MODES, default=["inference"])
    how.add_argument("--backend", nargs="+", default=["auto"], help="besides grouped (auto)")
    how.add_argument("--batch-size", nargs="+", type=number(int, 1), default=[8], metavar="N")
    how.add_argument(
        "--input-size", type=number(int, 1, 8192), metavar="PIXELS", help="instead of the config's"
    )
    how.add_argument(
        "--precision",
        "--dtype",
        dest="dtype",
        type=precision,
        choices=DTYPES,
        default="float32",
        help="or fp32, bf16, fp16; 16 bit: by autocast, as in training",
    )
    how.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    how.add_argument("--compile", action="store_true", help="torch.compile, static network too")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument(
        "--threads", type=number(int, 1, 1024), default=2, help="of operators on CPU (2)"
    )
    how.add_argument("--rounds", type=number(int, 1), default=20, help="interleaved rounds (20)")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out",
        "--output-dir",
        dest="output_dir",
        type=output_folder,
        metavar="DIR",
        help="default: work_dirs/benchmarks; of --standard docs/benchmarks, whose DIR.md is "
        "rendered",
    )
    files.add_argument("--name", help="what the result's name calls what is measured")
    args = parser.parse_args()
    kinds = (bool(args.configs or args.layer), args.standard is not None, args.render is not None)
    if sum(kinds) != 1:
        parser.error("expected one of: CONFIG or --layer; --standard; --render")
    allowed = {"configs", "layer", "standard", "render"}
    if args.standard is not None:
        allowed |= {"threads", "backend", "output_dir"}
    if args.standard is not None or args.render is not None:
        given = {key for key, value in vars(args).items() if value != parser.get_default(key)}
        if ignored := sorted(given - allowed):
            options = ", ".join("--" + key.replace("_", "-") for key in ignored)
            parser.error(f"{options}: of no effect with --standard or --render")
    return args


def plan_runs(args: argparse.Namespace) -> list[tuple[str | None, Case, Conditions]]:
    """What is to be run: a name, or none; the case; the conditions."""
    if args.standard is not None:
        runs = standard_runs(args.standard, threads=args.threads)
        if not runs:
            raise BenchmarkError(f"--standard {args.standard!r} matches none of its runs' names")
        return [(run.family, load_cases(run.configs)[0], run.conditions) for run in runs]
    cases_given = load_cases(args.configs, args.layer)
    if args.name is not None and len(cases_given) > 1:
        raise BenchmarkError(
            f"--name {args.name}: the networks have {len(cases_given)} different static forms, so "
            "that there are as many results; measure them one by one"
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return [
        (
            args.name,
            case,
            Conditions(
                mode=mode,
                device=device,
                dtype=args.dtype,
                batch_size=batch_size,
                input_size=args.input_size or case.input_size,
                threads=args.threads,
                channels_last=args.channels_last,
                compile=args.compile,
                rounds=args.rounds,
            ),
        )
        for case, mode, batch_size in itertools.product(cases_given, args.mode, args.batch_size)
    ]


__all__ = ["main"]


def main() -> None:
    args = parse_arguments()
    folder = args.render or args.output_dir
    if folder is None:
        folder = Path("docs/benchmarks" if args.standard is not None else "work_dirs/benchmarks")
    if args.render is None:
        code = describe_code()  # before anything is written
        done = []
        for name, case, conditions in plan_runs(args):
            result = run_case(case, conditions, args.backend, subject=name, code=code)
            paths = write_result(result, folder)
            print(f"\n{describe(result)}\n{table_of(result)}\n{paths[0]}, {paths[1].name}\n")
            done.append(result)
        if targets := targets_table(done):
            print(f"Targets, set beforehand\n{targets}\n")
    if args.render is not None or args.standard is not None:
        for path in render_page(folder, read_results(folder), folder.with_suffix(".md")):
            print(path)
