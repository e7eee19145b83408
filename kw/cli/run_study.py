"""Train every row of a study; what is finished is skipped, what is not is continued.

kw study run configs/tiny_imagenet/tiny_imagenet_cpu.yaml --jobs 3
kw study run configs/tiny_imagenet/tiny_imagenet_gpu.yaml --cfg-options data.root=PATH
"""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch

from ..benchmark.machine import describe_code, describe_machine, describe_versions
from ..study.files import load_study
from ..study.launch import run_all, unfinished
from ..study.summary import STARTED, name_of, read_earlier, read_started
from .tool import ToolParser, add_options, number, output_folder, save_json


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("study", metavar="STUDY", help="a study, see configs/tiny_imagenet")
    add_options(parser)
    parser.add_argument(
        "--work-dir", type=output_folder, help="folder of the runs; default: work_dirs/STUDY's name"
    )
    parser.add_argument(
        "--jobs", type=number(int, 1, 64), default=1, help="runs at a time, default 1"
    )
    parser.add_argument(
        "--threads", type=number(int, 1, 1024), default=1, help="CPU threads of a run, default 1"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="FILE",
        help="a summary of runs of this study that lie elsewhere; they count as done",
    )
    args = parser.parse_args()
    study = load_study(args.study, args.cfg_options, args.work_dir)
    runs = study.runs
    if args.earlier is not None:
        earlier = read_earlier(args.earlier, load_study(args.study, home=args.work_dir))
        done = {name_of(run) for run in earlier["runs"]}
        runs = tuple(run for run in runs if run.name not in done)
        print(f"{len(study.runs) - len(runs)} of {len(study.runs)} runs are in {args.earlier}")
    if not (study.home / STARTED).exists() or any(unfinished(runs)):
        _note(args, study.home / STARTED)
    status = run_all(runs, jobs=args.jobs, threads=args.threads)
    if status:
        sys.exit(status)


def _note(args: Namespace, path: Path) -> None:
    """Under what the runs were started, without local paths; later, with which code they go on."""
    code = describe_code()
    if path.exists():
        noted = read_started(path.parent)
        commits = [noted["code"], *noted["code"].get("later", ())]
        if all(code["commit"] != known["commit"] for known in commits):
            noted["code"]["later"] = [*commits[1:], code]
            save_json(noted, path)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = f"kw study run {args.study} --jobs {args.jobs} --threads {args.threads}"
    options = [option for option in args.cfg_options if not option.startswith("data.root=")]
    if options:
        command += f" --cfg-options {shlex.join(options)}"
    noted = {
        "command": command,
        "machine": describe_machine(device),
        "versions": describe_versions(device),
        "code": code,
    }
    save_json(noted, path)
