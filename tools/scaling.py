#!/usr/bin/env python
"""Measure how training scales on this machine, and compute how it does on 8, 64 and 512 GPUs.

python tools/scaling.py profile configs/imagenet/resnet18/kw_resnet18_4x.yaml   # one process
python tools/scaling.py measure configs/imagenet/resnet18/kw_resnet18_4x.yaml --processes 1 2 4
python tools/scaling.py predict configs/imagenet/resnet18/kw_resnet18_4x.yaml --gpu h100
python tools/scaling.py project PROFILE.json --step STEP.json --cluster h100-ndr
python tools/scaling.py render [--check]          # the tables of docs/scaling.md, from its results

docs/scaling.md has the formula, the links' speeds with their sources, and what was found.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kw.benchmark.cases import NetworkSource
from kw.benchmark.conditions import DTYPES, BenchmarkError, Conditions
from kw.benchmark.scaling.files import (
    Processes,
    Profile,
    SingleStep,
    provenance,
    read_folder,
    read_profile,
    read_step,
    to_dict,
)
from kw.benchmark.scaling.links import CLUSTERS
from kw.benchmark.scaling.page import GPUS as COUNTS
from kw.benchmark.scaling.page import projection, render_page
from kw.benchmark.scaling.predict import predict_step
from kw.benchmark.scaling.processes import Plan, measure_processes
from kw.benchmark.scaling.profile import profile_step
from kw.cli import ToolParser, add_options, number, output_folder, run_tool, save_json
from kw.config import load_config
from kw.evaluation import render_table
from kw.warehouse.ops.device import GPUS

DOCS = Path(__file__).parents[1] / "docs"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    profile = commands.add_parser("profile", help="a step, and when every gradient comes")
    measure = commands.add_parser("measure", help="processes that train together")
    predict = commands.add_parser("predict", help="a step on a GPU that is not there")
    project = commands.add_parser("project", help="from one device to many")
    render = commands.add_parser("render", help="the tables of docs/scaling.md")
    for command in (profile, measure, predict):
        command.add_argument("configs", nargs="+", metavar="CONFIG", help="of classifiers (YAML)")
        add_options(command)
        batch = 128 if command is predict or DEVICE == "cuda" else 8
        command.add_argument(
            "--batch-size", type=number(int, 1), default=batch, help=f"of a process ({batch})"
        )
        command.add_argument("--output-dir", type=output_folder, default=Path("work_dirs/scaling"))
    for command in (profile, measure):
        command.add_argument("--rounds", type=number(int, 1), default=5, help="(5)")
        command.add_argument(
            "--threads", type=number(int, 1, 1024), default=1, help="of operators on CPU (1)"
        )
    profile.add_argument("--dtype", choices=DTYPES, default="float32")
    measure.add_argument("--processes", nargs="+", type=number(int, 1, 1024), required=True)
    measure.add_argument(
        "--updates", type=number(int, 1), default=3, help="timed in each round (3)"
    )
    predict.add_argument("--gpu", choices=GPUS, default="h100", help="by its data sheet")
    predict.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    project.add_argument("profile", type=Path, metavar="PROFILE.json")
    project.add_argument(
        "--step",
        type=Path,
        metavar="JSON",
        help="of tools/benchmark.py or predict; default: the profile's",
    )
    project.add_argument("--cluster", choices=CLUSTERS, default="h100-ndr")
    project.add_argument("--gpus", nargs="+", type=number(int, 1), default=list(COUNTS))
    project.add_argument(
        "--bucket-mb", type=number(float, 1e-3), default=25.0, help="distributed.bucket_mb (25)"
    )
    render.add_argument("--check", action="store_true", help="change nothing; fail where stale")
    return parser.parse_args()


def profile(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for source in sources(args):
        size = source.config.data.input_size
        conditions = Conditions(
            "train", DEVICE, args.dtype, args.batch_size, size, args.threads, rounds=args.rounds
        )
        where = provenance(DEVICE)
        measured = profile_step(source, conditions)
        save(Profile(source.name, size, args.dtype, args.threads, measured, where), args.output_dir)


def measure(args: argparse.Namespace) -> None:
    for source in sources(args):
        config = replace(source.config, batch_size=args.batch_size)
        plan = Plan(
            config,
            tuple(sorted({1, *args.processes})),
            args.rounds,
            updates=args.updates,
            threads=args.threads,
        )
        plan.check()
        where = provenance(DEVICE)
        measured = measure_processes(plan)
        result = Processes(
            source.name,
            args.batch_size,
            config.data.input_size,
            args.threads,
            config.distributed.bucket_mb,
            measured,
            where,
        )
        save(result, args.output_dir)


def predict(args: argparse.Namespace) -> None:
    for source in sources(args):
        step = predict_step(source, args.batch_size, TYPES[args.dtype], GPUS[args.gpu])
        where = provenance(DEVICE)
        save(SingleStep(source.name, args.gpu, args.dtype, True, step, where), args.output_dir)


def project(args: argparse.Namespace) -> None:
    profile = read_profile(args.profile)
    step, device = profile.measured.step, profile.where["machine"]["device"]
    if args.step is not None:
        step, device = read_step(args.step, profile.model)
    cluster = CLUSTERS[args.cluster]
    rows = projection(profile, step, cluster, args.gpus, args.bucket_mb)
    print(f"{profile.model}, a step of {1e3 * step.seconds:.1f} ms on {device}; {cluster.title}")
    print(render_table(("GPUs", "exposed ms", "efficiency", "images/s"), rows))


def render(args: argparse.Namespace) -> None:
    page = DOCS / "scaling.md"
    text = page.read_text(encoding="utf-8")
    made = render_page(text, read_folder(DOCS / "scaling", DOCS / "benchmarks"))
    if made == text:
        return
    if args.check:
        print(f"not up to date: {page}; run python tools/scaling.py render", file=sys.stderr)
        sys.exit(1)
    page.write_text(made, encoding="utf-8")
    print(page)


def sources(args: argparse.Namespace) -> list[NetworkSource]:
    """The networks that the command line names."""
    found = []
    for path in args.configs:
        if Path(path).suffix == ".py":
            raise BenchmarkError(f"{path}: a detector's configuration; expected a classifier's")
        found.append(NetworkSource(Path(path).stem, load_config(path, args.cfg_options)))
    return found


def save(result: Profile | Processes | SingleStep, folder: Path) -> None:
    """Write a result and say where."""
    path = folder / f"{result.name}.json"
    save_json(to_dict(result), path)
    print(path, flush=True)


def main() -> None:
    args = parse_arguments()
    commands = {
        "profile": profile,
        "measure": measure,
        "predict": predict,
        "project": project,
        "render": render,
    }
    commands[args.command](args)


if __name__ == "__main__":
    run_tool(main)
