"""Measure what dynamic networks cost beside the static one: time, training step, peak memory.

kw benchmark networks configs/imagenet/resnet18/kw_resnet18_4x.yaml --threads 2 --batch-size 8
kw benchmark networks --layer in=512,out=512,size=7,ratio=4 --mode inference train
kw benchmark networks --render docs/benchmarks     # tables and plots again, from the JSON files

The static network and the back end "grouped" are measured in every run, interleaved with the back
ends asked for. docs/benchmarks.md says what is counted.
"""

import argparse
import itertools
from pathlib import Path

import torch

from ..benchmark.cases import load_cases
from ..benchmark.conditions import DTYPES, MODES, BenchmarkError, Conditions
from ..benchmark.page import describe, render_page, table_of
from ..benchmark.results import read_results, write_result
from ..benchmark.run import run_case
from .tool import ToolParser, number, output_folder, precision


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
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
        "--render",
        type=Path,
        metavar="DIR",
        help="measure nothing: plots in DIR and tables in DIR.md from the results in DIR",
    )
    how = parser.add_argument_group("conditions")
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
    how.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )
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
        default=Path("work_dirs/benchmarks"),
        metavar="DIR",
        help="default: work_dirs/benchmarks",
    )
    files.add_argument("--name", help="what the result's name calls what is measured")
    args = parser.parse_args()
    if bool(args.configs or args.layer) == (args.render is not None):
        parser.error("expected one of: CONFIG or --layer; --render")
    if args.render is not None:
        given = {key for key, value in vars(args).items() if value != parser.get_default(key)}
        if ignored := sorted(given - {"configs", "layer", "render", "debug"}):
            options = ", ".join("--" + key.replace("_", "-") for key in ignored)
            parser.error(f"{options}: of no effect with --render")
    return args


def main() -> None:
    args = parse_arguments()
    if args.render is not None:
        folder = args.render if args.render.name else args.render.absolute()  # of "."
        page = folder.with_name(f"{folder.name}.md")
        for path in render_page(folder, read_results(folder), page):
            print(path)
        return
    cases = load_cases(args.configs, args.layer)
    if args.name is not None and len(cases) > 1:
        raise BenchmarkError(
            f"--name {args.name}: the networks have {len(cases)} different static forms, so "
            "that there are as many results; measure them one by one"
        )
    for case, mode, batch_size in itertools.product(cases, args.mode, args.batch_size):
        conditions = Conditions(
            mode=mode,
            device=args.device,
            dtype=args.dtype,
            batch_size=batch_size,
            input_size=args.input_size or case.input_size,
            threads=args.threads,
            channels_last=args.channels_last,
            compile=args.compile,
            rounds=args.rounds,
        )
        result = run_case(case, conditions, args.backend, subject=args.name)
        paths = write_result(result, args.output_dir)
        print(f"\n{describe(result)}\n{table_of(result)}\n{paths[0]}, {paths[1].name}\n")
