"""Train every row of a study; what is finished is skipped, what is not is continued.

kw study run configs/tiny_imagenet/tiny_imagenet_cpu.yaml --jobs 3
kw study run configs/tiny_imagenet/tiny_imagenet_gpu.yaml --cfg-options data.root=PATH
"""

import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..benchmark.machine import describe_code, describe_machine, describe_versions
from ..config.study import StudyRun, load_study
from ..errors import UserError
from ..evaluation.study import STARTED
from .tool import ToolParser, add_options, number, output_folder, save_json

__all__ = ["main"]


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
    args = parser.parse_args()
    study = load_study(args.study, args.cfg_options)
    folder = args.work_dir or Path("work_dirs", study.name)

    if not (folder / STARTED).exists():
        _note(args, folder / STARTED)

    started: dict[str, Future[bool]] = {}

    def train(run: StudyRun) -> bool:
        # Runs start in order, so that the one before has a thread already.
        if run.continues is not None and not started[run.continues].result():
            print(f"{run.name}: left out, {run.continues} failed", file=sys.stderr, flush=True)
            return False
        return _train(run, folder, args.threads)

    with ThreadPoolExecutor(args.jobs) as pool:
        for run in study.runs:
            started[run.name] = pool.submit(train, run)
        ended = [future.result() for future in started.values()]
    failed = [run.name for run, ok in zip(study.runs, ended, strict=True) if not ok]
    if failed:
        raise UserError(f"{len(failed)} of {len(study.runs)} runs failed: {', '.join(failed)}")


def _note(args: Namespace, path: Path) -> None:
    """Under what the runs were started, without local paths."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = f"kw study run {args.study} --jobs {args.jobs} --threads {args.threads}"
    options = [option for option in args.cfg_options if not option.startswith("data.root=")]
    if options:
        command += f" --cfg-options {shlex.join(options)}"
    noted = {
        "command": command,
        "machine": describe_machine(device),
        "versions": describe_versions(device),
        "code": describe_code(),
    }
    save_json(noted, path)


def _train(run: StudyRun, runs: Path, threads: int) -> bool:
    """One run, to its end; its output goes to ``output.txt`` of its folder."""
    folder = runs / run.name
    if (folder / "finished").exists():
        print(f"{run.name}: finished already", flush=True)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kw", "train", str(run.config)]
    command += ["--work-dir", str(folder), "--resume"]
    options = [*run.options]
    if run.continues is not None:
        options.append(f"model.weights={runs / run.continues / 'last.pth'}")
    started = time.time()
    print(f"{run.name}: started\n", end="", flush=True)  # at once: two may start together
    with open(folder / "output.txt", "a") as output:
        status = subprocess.call(
            [*command, "--cfg-options", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    minutes = (time.time() - started) / 60
    if status == 0:
        (folder / "finished").touch()
        print(f"{run.name}: finished in {minutes:.1f} minutes", flush=True)
    else:
        print(f"{run.name}: status {status}, see {output.name}", file=sys.stderr, flush=True)
    return status == 0
