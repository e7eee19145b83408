"""Run the commands of README.md and docs/, end to end, on small generated data.

python tests/run_docs.py               # all pages, half an hour
python tests/run_docs.py tour training # these

A command is run as it stands, but on little: one epoch, small images, few of them, two processes
for eight. What is tested elsewhere is not run here; it is listed with the reason.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from doc_pages import PAGES, ROOT, SHELL, Block, Command, Recorder, read_blocks

from kw.cli import command_of

# Of a classifier on the folder that generate() makes.
SMALL = [
    "data.root=data/small",
    "model.num_classes=4",
    "data.input_size=32",
    "data.workers=0",
    "epochs=1",
    "total_batch_size=16",
    "batch_size=8",
    "schedule.warmup_epochs=0",
    "log_interval=1",
    "eval_interval=1",
]
SMALL_DETECTION = ["epochs=1", "batch_size=2", "schedule.warmup_epochs=0", "eval_interval=1"]
LINKED = "data.root=data/linked"
DETECTOR = "configs/demo/overfit_coco.py"
SET = [
    "data.train_annotations=annotations/instances_train2017.json",
    "data.val_annotations=annotations/instances_val2017.json",
    "data.val_images=val2017",
]
# Of a study: its networks are narrow already.
STUDY = [*SMALL[:3], "total_batch_size=16", "batch_size=16", *SMALL[7:9]]
# Of a published table, on the digits that --scale tiny takes.
TABLE = ["epochs=1", "total_batch_size=256", "batch_size=256", "data.workers=0"]
TABLE += ["data.input_size=16"]
ELSEWHERE = {
    "pip": "installs",
    "make": "install, demo, lint and test are what CI runs",
    "sbatch": "tests/test_launchers.py, with stand-ins for slurm's commands",
    "scripts/prepare_imagenet.sh": "tests/test_prepare_imagenet.py, on small archives",
    "scripts/prepare_coco.sh": "tests/test_prepare_coco.py, on small archives",
    "scripts/compare_loading.py": "tests/test_fast.py, on a few pictures",
    "scripts/compare_decoders.py": "tests/test_fast.py, on a few pictures",
    "tools/convert_checkpoint.py": "tests/test_authors_checkpoints.py, on files with their keys",
    "examples/torchvision_loop.py": "tests/test_torchvision.py, on fewer images",
    "tests/kills.py": "tests/test_resume.py, with fewer kills",
    "scripts/benchmark_runtimes.py": "needs OpenVINO and ExecuTorch",
    "tests/time_coco_evaluation.py": "a measurement",
}
# What a page leaves open or takes for granted, and what generate() makes for it.
STANDS_FOR = {
    "IMAGES...": "photos/val/cat/0.png",
    "CONFIG...": "configs/demo/kw_resnet18_1x.yaml",
    "CONFIG": "configs/demo/kw_resnet18_1x.yaml",
}
SCRIPTS = (
    "scripts/check_exports.py",
    "scripts/compare_backends.py",
    "scripts/scaling.py",
    "scripts/subset_coco.py",
)
BENCHMARK = ["--rounds", "1", "--batch-size", "2", "--input-size", "32"]


@dataclass(frozen=True)
class Run:
    """A command made small.

    Attributes:
        words: program and arguments.
        variables: environment.
    """

    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


def shrink(command: Command) -> Run | str:
    """What to run for a command, or why it is not run here.

    Raises:
        KeyError: nothing is known about it.
    """
    program, *words = (STANDS_FOR.get(word, word) for word in command.words)
    if program in ELSEWHERE:
        return ELSEWHERE[program]
    if program == "scripts/train.sh":
        tool, arguments = shrink_tool("tools/train.py", words)
        return Run(("scripts/train.sh", *arguments), (("PROCESSES", "1"),))
    if program == "torchrun":
        at = next(i for i, word in enumerate(words) if word.startswith("tools/"))
        tool, arguments = shrink_tool(words[at], words[at + 1 :])
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        return Run((sys.executable, *launcher, tool, *arguments))
    if program == "kw" or words[:2] == ["-m", "kw"]:
        name, module, arguments = command_of(words if program == "kw" else words[2:])
        assert module is not None
        tool, small = shrink_tool(module, arguments)
        return Run((sys.executable, "-m", *name.split(), *small))
    if program != "python":
        raise KeyError(program)
    script, *arguments = words
    if script in ELSEWHERE:
        return ELSEWHERE[script]
    if script == "-m" and arguments[0] == "pytest":
        return "make test"
    if script == "-m":
        few = ["--train", "8", "--val", "4"] if arguments[0] == "kw.data.digit_scenes" else []
        return Run((sys.executable, "-m", *arguments, *few))
    if script == "tools/benchmark.py" and "--render" in arguments:
        return "tests/test_benchmark.py, on small results"
    if script.startswith("tools/") or script in SCRIPTS:
        script, arguments = shrink_tool(script, arguments)
    elif (ROOT / script).exists():
        raise KeyError(script)
    return Run((sys.executable, script, *arguments))


def shrink_tool(tool: str, arguments: list[str]) -> tuple[str, list[str]]:
    """A tool's arguments with settings that make it small."""
    name = Path(tool).stem
    if name == "benchmark":
        layer = "--layer" in arguments
        mode = [] if "--mode" in arguments else ["--mode", "inference"]
        few = [*mode, *BENCHMARK[: -2 if layer else None]]
        return tool, [*without(arguments, BENCHMARK), *few]
    if name == "compare_backends":
        return tool, [*without(arguments, ["--steps"]), "--steps", "1"]
    if name == "measure_loading":
        arguments = [*without(arguments, ["--images"]), "--images", "16"]
        return tool, with_options(arguments, [*SMALL[:4], "total_batch_size=8", "batch_size=8"])
    if name == "export":  # the configuration of what was trained small
        return tool, [str(Path(arguments[1]).parent / "config.yaml"), *arguments[1:]]
    if name == "check_exports":
        configs = [word for word in arguments if word.endswith(".yaml")]
        return tool, [configs[0], *arguments[len(configs) :]]
    if name == "run_study":
        return tool, with_options(arguments, STUDY)
    if name == "reproduce" and {"--run", "--collect"} & set(arguments):
        arguments = [*without(arguments, ["--scale"]), "--scale", "tiny"]
        return tool, with_options([*arguments, "--rows", "resnet18"], TABLE)
    if name == "scaling":
        return tool, with_options([*arguments, "--batch-size", "2"], ["data.input_size=32"])
    if name not in ("train", "test", "visualize", "check_coco"):
        return tool, arguments
    at = 1 if name == "visualize" else 0
    config = arguments[at]
    detector = config.endswith(".py")
    if config.startswith("work_dirs/"):  # small already
        return tool, arguments
    if detector:
        options = list(SMALL_DETECTION)
        if not config.startswith("configs/demo/"):
            stem, arguments = Path(config).stem, [*arguments[:at], DETECTOR, *arguments[at + 1 :]]
            options += SET
            if name == "train" and "--work-dir" not in arguments:
                arguments[at + 1 : at + 1] = ["--work-dir", f"work_dirs/{stem}"]
        if name in ("visualize", "test"):
            options = [o for o in options if o.startswith("data.")]
        if name == "check_coco":
            options = SET
    else:
        dynamic = Path(config).stem.startswith("kw_")
        options = [*SMALL, f"temperature_epochs={0.5 if dynamic else 0}"]
        if LINKED in arguments or config == "mine.yaml":  # a set of the page's own
            options = options[2:]
    return tool, with_options(arguments, options)


def with_options(arguments: list[str], options: list[str]) -> list[str]:
    """Settings over those that the command gives itself."""
    if not options:
        return arguments
    keys = {option.partition("=")[0] for option in options}
    arguments = [word for word in arguments if word.partition("=")[0] not in keys]
    if "--cfg-options" not in arguments:
        return [*arguments, "--cfg-options", *options]
    at = arguments.index("--cfg-options") + 1
    return [*arguments[:at], *options, *arguments[at:]]


def without(arguments: list[str], flags: list[str]) -> list[str]:
    """Arguments without some flags and the values that follow them."""
    kept, dropping = [], False
    for word in arguments:
        if word.startswith("--"):
            dropping = word in flags
        if not dropping:
            kept.append(word)
    return kept


def generate(folder: Path) -> None:
    """Data, and a folder to start the commands in."""
    from coco_set import write_coco_set
    from conftest import write_images

    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tools").symlink_to(ROOT / "tools")
    write_images(folder / "data/small", "train", (8, 8, 8, 8), seed=0)
    write_images(folder / "data/small", "val", (3, 3, 3, 2), seed=1)
    coco = write_coco_set(folder / "data/coco", train=10)
    for split in ("train", "val"):
        for part in (split, f"annotations/instances_{split}.json"):
            (coco / part).rename(coco / part.replace(split, f"{split}2017"))
    shutil.copytree(coco, folder / "FOLDER")
    photos = folder / "photos"
    shutil.copytree(folder / "data/small", photos)
    rows = [p.relative_to(photos) for p in sorted(photos.glob("*/*/*.png"))]
    lines = [
        f"{row},{row.parts[0]},{row.parts[1]}" for row in rows if row.parts[1] in ("cat", "dog")
    ]
    for name in ("DATA", "PATH", "data/imagenet"):
        (folder / name).symlink_to(folder / "data/small")
    for name in ("cat.jpg", "ONE.png", "OTHER.png"):
        shutil.copy(photos / rows[len(name)], folder / name)
    table = folder / "data/table"
    shutil.copytree(folder / "data/small", table)
    pairs = [row for row in rows if row.parts[1] in ("cat", "dog")]
    rows_of_table = [f"{row},{row.parts[1]},{row.parts[0]}" for row in pairs]
    (table / "labels.csv").write_text("\n".join(["file,label,split", *rows_of_table]) + "\n")
    (folder / "labels.csv").write_text("\n".join(["file,split,label", *lines]) + "\n")
    # Two runs that pages compare and go on with.
    for name in ("resnet18", "kw_resnet18_1x"):
        train = f"python tools/train.py configs/demo/{name}.yaml --work-dir runs/{name}"
        small = shrink(Command(Block(PAGES[0], 0, "", ""), tuple(train.split())))
        assert isinstance(small, Run)
        start(folder, small).check_returncode()


def start(folder: Path, small: Run) -> subprocess.CompletedProcess[str]:
    """Run a command that was made small."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # on so little, threads would only wait for one another
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        **dict(small.variables),
    }
    words = [  # globs of what the page's commands have written, which bash could not see
        path
        for word in small.words
        for path in (sorted(glob.glob(word, root_dir=folder)) if "*" in word else [word])
    ]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def make_room(folder: Path, words: tuple[str, ...]) -> None:
    """Remove the run that a page has trained before where it trains anew."""
    if "tools/train.py" not in words or "--resume" in words:
        return
    named = words[words.index("--work-dir") + 1] if "--work-dir" in words else None
    stem = Path(words[words.index("tools/train.py") + 1]).stem
    shutil.rmtree(folder / (named or f"work_dirs/{stem}"), ignore_errors=True)


def run(folder: Path, page: Path, recorder: Recorder) -> list[str]:
    """Run a page's commands in order and print what became of each; the places that failed."""
    failed = []
    shutil.rmtree(folder / "work_dirs", ignore_errors=True)
    shutil.copytree(folder / "runs", folder / "work_dirs")
    for block in read_blocks(page):
        if block.mark == "file":
            (folder / block.what).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.what).write_text(block.code)
        elif block.language in SHELL and not block.runs:
            print(f"not run: {block.place}  ({block.what})")
        elif block.language in SHELL:
            for command in recorder.commands(block):
                what, small = f"{block.place}  {' '.join(command.words)}", shrink(command)
                if isinstance(small, str):
                    print(f"not run: {what}  ({small})")
                    continue
                begin = time.monotonic()
                make_room(folder, small.words)
                ended = start(folder, small)
                print(
                    f"{ended.returncode:3d} {time.monotonic() - begin:4.0f} s  {what}", flush=True
                )
                if ended.returncode:
                    failed.append(block.place)
                    print(ended.stdout[-1500:] + ended.stderr[-4000:], flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="names of pages; all if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, record = Path(name) / "run", Path(name) / "record"
        folder.mkdir()
        record.mkdir()
        generate(folder)
        recorder = Recorder(record)
        pages = [page for page in PAGES if not args.pages or page.stem in args.pages]
        failed = [place for page in pages for place in run(folder, page, recorder)]
    print(f"{len(failed)} commands failed", *failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
