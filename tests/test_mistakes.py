"""Every tool's answers to wrong command lines and files: one message, status 2, no traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forked

from kw.cli import COMMANDS, ToolParser, run_tool
from kw.data import DataError
from kw.errors import UserError, answer

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
MODULES = {module for module, _ in COMMANDS.values()}
ALONE = {  # commands that no tool is the same as
    f"kw_{name.replace(' ', '_')}"
    for name, (module, _) in COMMANDS.items()
    if f"{module}.py" not in TOOLS
}
R18 = "configs/demo/kw_resnet18_1x.yaml"
STUDY = "configs/tiny_imagenet/tiny_imagenet_cpu.yaml"
FITS = "--work-dir {place}/new --cfg-options data.root={place}/images model.num_classes=4"


@pytest.fixture
def place(tmp_path: Path, images: Path) -> Path:
    """A folder of wrong files, and a link to data that are in order."""
    (tmp_path / "images").symlink_to(images)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # é".encode("latin-1"))
    (tmp_path / "notes.json").write_text("[1, 2]")
    (tmp_path / "folder").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"params": 1, "top1": 2.0, "weights": "model"}')
    (run / "log.jsonl").write_text('{"mode": "train", "epoch": 1}\n')
    return tmp_path


MISTAKES: list[tuple[str, list[str]]] = [
    # tool and arguments; words of the message
    ("train.py", ["required: CONFIG"]),
    ("train.py none.yaml", ["none.yaml", "no such file"]),
    ("train.py {place}/folder", ["folder", "cannot be read"]),
    ("train.py {place}/picture.png", ["picture.png", "not text"]),
    ("train.py {place}/latin.yaml", ["latin.yaml", "not text"]),
    ("train.py {place}/empty", ["empty: model.name is missing"]),
    (f"train.py {R18} --cfg-options", ["--cfg-options", "expected at least one argument"]),
    (f"train.py {R18} --cfg-options lr", ["'lr': expected KEY=VALUE"]),
    (f"train.py {R18} --cfg-options data.root=none", ["data.root none does not exist"]),
    (f"train.py {R18} --cfg-options batch_size=1000000000000", ["batch_size", "<= 65536"]),
    (f"train.py {R18} --cfg-options data.workers=100000", ["data.workers", "<= 512"]),
    (f"train.py {R18} --work-dir {{place}}/empty", ["empty", "is a file: expected a folder"]),
    (f"train.py {R18} --work-dir {{place}}/empty/x", ["empty", "is a file: expected a folder"]),
    (f"train.py {R18} {FITS} --resume none.pth", ["none.pth", "no such file"]),
    (f"train.py {R18} {FITS} --resume {{place}}/folder", ["folder", "no such file"]),
    (f"train.py {R18} {FITS} --resume {{place}}/picture.png", ["picture.png", "cannot be read"]),
    (f"train.py {R18} --launcher pytorch", ["--launcher pytorch", "RANK", "torchrun"]),
    (f"train.py {R18} --launcher slurm", ["--launcher slurm", "srun"]),
    (f"train.py {R18} --launcher mpi", ["--launcher", "invalid choice", "pytorch"]),
    (f"train.py {R18} --unknown 3", ["unrecognized arguments: --unknown 3"]),
    (f"test.py {R18}", ["required: CHECKPOINT"]),
    (f"test.py {R18} none.pth", ["none.pth", "no such file"]),
    (f"test.py {R18} {R18}", ["kw_resnet18_1x.yaml", "cannot be read"]),
    (f"test.py {{place}}/picture.png {R18}", ["picture.png", "not text"]),
    (f"test.py {R18} none.pth --json {{place}}/folder", ["--json", "is a folder"]),
    (f"test.py {R18} none.pth --json {{place}}/empty/x.json", ["--json", "is a file"]),
    ("kw_pack {place}/images", ["expected ROOT and OUT, or --check FILE"]),
    ("kw_pack {place}/images {place}/set.tar", ["set.tar", "ends with .zip"]),
    ("kw_pack none {place}/set.zip", ["data.root none does not exist"]),
    ("kw_pack {place}/images {place}/s.zip --side 0", ["--side: '0': expected an integer >= 1"]),
    ("kw_pack {place}/images {place}/s.zip --dataset tar", ["train.tar: No such file"]),
    ("kw_pack --check {place}/picture.png", ["picture.png", "not a zip file"]),
    ("print_config.py none.yaml", ["none.yaml", "no such file"]),
    ("print_config.py --reference wrong", ["invalid choice: 'wrong'"]),
    ("analyze.py none.yaml", ["none.yaml", "no such file"]),
    (f"analyze.py {R18} --cfg-options data.input_size=0", ["data.input_size = 0", ">= 1"]),
    (f"analyze.py {R18} --json {{place}}/folder", ["--json", "is a folder"]),
    (f"kw_inspect_backends {R18} --threads 0", ["--threads: '0': expected an integer >= 1"]),
    (f"kw_inspect_backends {R18} --batch-size -4", ["--batch-size", "'-4': expected an integer"]),
    (f"kw_inspect_backends {R18} --batch-size 1e3", ["'1e3': expected an integer >= 1"]),
    (f"kw_inspect_backends {R18} --set epochs=0", ["epochs = 0: expected an integer >= 1"]),
    (f"kw_inspect_backends {R18} --device tpu", ["'tpu': expected cpu, cuda or cuda:N"]),
    (f"kw_inspect_backends {R18} --device cuda:99", ["'cuda:99': PyTorch sees"]),
    ("compare_decoders.py {place}/folder", ["folder: no *.jpg and no *.jpeg in it"]),
    ("compare_backends.py --models vgg", ["--models", "invalid choice: 'vgg'"]),
    ("compare_backends.py --dtype int8", ["--dtype", "invalid choice: 'int8'"]),
    ("compare_backends.py --backends native2", ["native2", "did you mean 'native'?"]),
    ("compare_backends.py --steps 0", ["--steps: '0': expected an integer >= 1"]),
    ("benchmark.py", ["expected one of: CONFIG or --layer; --render"]),
    ("benchmark.py configs/demo/resnet18.yaml", ["resnet18.yaml", "static network"]),
    ("reproduce.py imagenet_300", ["'imagenet_300'", "imagenet_300ep"]),
    ("reproduce.py imagenet_300ep --rows none", ["none"]),
    (f"scaling.py {R18} --gpus 0", ["--gpus: '0': expected an integer >= 1"]),
    (f"benchmark.py {R18} --rounds 0", ["--rounds: '0': expected an integer >= 1"]),
    (f"benchmark.py {R18} --output-dir {{place}}/empty", ["--output-dir", "is a file"]),
    ("benchmark.py --layer in=3,out=3", ["--layer", "size missing"]),
    ("benchmark.py --render {place}/folder", ["folder has no files benchmark-*.json"]),
    (f"convert_checkpoint.py none.pth {R18} out.pth", ["none.pth", "no such file"]),
    (f"kw_convert_network {R18} out.pth --weights none.pth", ["none.pth", "no such file"]),
    (f"convert_checkpoint.py {{place}}/picture.png {R18} {{place}}/o.pth", ["picture.png"]),
    (f"convert_checkpoint.py {{place}}/empty {R18} {{place}}/folder", ["is a folder"]),
    ("kw_study_compare {place}/folder", ["folder has no results.json"]),
    ("kw_study_compare {place}/run", ["log.jsonl:1: iter = None: expected int"]),
    ("kw_study_compare {place}/run --plot {place}/folder", ["--plot", "is a folder"]),
    ("render_tables.py --root {place}", ["--root", "expected a folder of families"]),
    ("render_results.py --root {place}", ["--root", "a folder with results.md and results/"]),
    ("kw_study_run none.yaml", ["none.yaml", "no such file"]),
    (f"kw_study_run {R18}", ["seed = 0: expected a known key; did you mean seeds?"]),
    (f"kw_study_run {STUDY} --jobs 0", ["--jobs: '0': expected an integer >= 1"]),
    (f"kw_study_run {STUDY} --cfg-options epochs=0", ["epochs = 0: expected an integer >= 1"]),
    (f"kw_study_summarize {STUDY} --work-dir {{place}}", ["none of 15 runs of the study ended"]),
    (f"kw_study_summarize {STUDY} --plot {{place}}/folder", ["--plot", "is a folder"]),
    ("kw_benchmark_loading none.yaml", ["none.yaml", "no such file"]),
    (
        f"kw_benchmark_loading {R18} --cfg-options data.root={{place}}/images model.num_classes=4"
        " total_batch_size=512 batch_size=512",
        ["the training set has 64 images, too few for one update"],
    ),
    (f"kw_benchmark_loading {R18} --images 0", ["--images: '0': expected an integer >= 1"]),
    (f"export.py {R18} none.pth x.onnx", ["none.pth", "no such file"]),
    ("export.py {place}/run {place}/folder", ["argument TARGET", "is a folder"]),
    (f"export.py {R18} {{place}}/picture.png x.onnx", ["picture.png", "cannot be read"]),
    (f"export.py {R18} none.pth x.tflite", ["x.tflite", ".pte, .pt2, .safetensors", "'.tflite'"]),
    (f"export.py {R18} none.pth x.onnx --batch 0", ["--batch", "expected an integer >= 1"]),
    ("predict.py none.onnx {place}/none.jpg", ["none.jpg", "no such file or folder"]),
    ("predict.py {place}/notes.json {place}/picture.png", ["notes.json", "found '.json'"]),
    ("predict.py {place}/none.onnx {place}/picture.png", ["none.onnx", "no such file"]),
    ("predict.py {place}/empty {place} --top 0", ["--top: '0': expected an integer >= 1"]),
    ("predict.py hf-hub:user {place}/picture.png", ["'hf-hub:user': expected user/model"]),
    ("kw_push {place}/folder", ["required: USER/MODEL, or --dry-run DIR"]),
    ("kw_push {place}/folder user", ["'user': expected user/model"]),
    ("kw_push {place}/folder --dry-run {place}/new", ["folder", "no *.pth there"]),
    ("kw_push {place}/folder --dry-run {place}/run", ["run: has other files (log.jsonl)"]),
    ("kw_push none.pth --dry-run {place}/new", ["none.pth", "no such file"]),
    ("kw_pull user {place}/new", ["'user': expected user/model"]),
    ("kw_pull user/model {place}/run", ["run: is not empty"]),
    ("kw_pull user/model {place}/empty", ["empty is a file: expected a folder"]),
    ("kw_benchmark_exports {place}/images none.pth", ["none.pth", "no such file or folder"]),
    ("kw_benchmark_exports {place}/folder none.pth", ["folder"]),
    ("compile_kernels.py --targets sm_1", ["--targets", "invalid choice: 'sm_1'"]),
    ("compile_kernels.py --dtypes fp64", ["--dtypes", "invalid choice: 'fp64'"]),
    ("compare_loading.py none", ["none", "expected a folder with train/"]),
    ("compare_loading.py . --images 0", ["--images: '0': expected an integer >= 1"]),
    ("check_exports.py none.yaml", ["none.yaml", "no such file"]),
    ("benchmark_runtimes.py none.yaml", ["none.yaml", "no such file"]),
    (f"check_exports.py {R18} --formats tflite", ["--formats", "invalid choice: 'tflite'"]),
]
DETECTION: list[tuple[str, list[str]]] = [
    ("train.py none.py", ["none.py", "no such file"]),
    ("check_coco.py", ["required: CONFIG | ANNOTATIONS"]),
    ("check_coco.py one two three", ["expected pairs of ANNOTATIONS and IMAGES_DIR"]),
    ("check_coco.py none.json {place}", ["none.json"]),
    ("subset_coco.py none.json {place}/out.json --images 3", ["none.json"]),
    ("subset_coco.py {place}/notes.json {place}/out.json --images 3", ["notes.json", "a list"]),
    ("subset_coco.py none.json {place}/out.json --images 0", ["--images", "expected an integer"]),
    ("visualize.py", ["required: kind"]),
    (f"visualize.py detections {R18} none.pth --out {{place}}/empty", ["--out", "is a file"]),
    (f"visualize.py detections {R18} none.pth --out {{place}} --score 2", ["--score", "<= 1"]),
]


def expect_answer(
    line: str, words: list[str], tool: Callable, place: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    name, *arguments = line.split()
    folder = "scripts" if name in SCRIPTS else "tools"
    called = name.replace("_", " ") if name.startswith("kw_") else f"{folder}/{name}"
    with pytest.raises(SystemExit) as end:
        tool(called, *(argument.format(place=place) for argument in arguments))
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.count("error: ") == 1, said
    assert said.startswith("error: "), said
    assert "Traceback" not in said
    for word in words:
        assert word in said
    return said


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes(
    line: str, words: list[str], tool: Callable, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_answer(line, words, tool, place, capsys)


@pytest.mark.parametrize(("line", "words"), DETECTION, ids=[line for line, _ in DETECTION])
def test_mistakes_about_detectors(
    line: str, words: list[str], tool: Callable, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmdet", reason="needs mmdetection", exc_type=ImportError)
    expect_answer(line, words, tool, place, capsys)


def test_all_tools_are_asked() -> None:
    asked = {line.split()[0] for line, _ in [*MISTAKES, *DETECTION]}
    assert asked == {*TOOLS, *SCRIPTS, *ALONE} - {"kw_doctor"}  # which takes no file


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_debugs(name: str) -> None:
    text = (ROOT / "tools" / name).read_text()
    assert "run_tool(main)" in text
    assert Path(name).stem in MODULES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_command_has_the_parser(module: str) -> None:
    assert "ToolParser(" in (ROOT / "kw/cli" / f"{module}.py").read_text()


@pytest.mark.parametrize(
    ("line", "rest"),
    [("run --json f more", ["more"]), ("run more --json f -- -x", ["more", "-x"]), ("run", [])],
)
def test_options_may_stand_between_the_words_of_an_argument(line: str, rest: list[str]) -> None:
    """argparse itself refuses the first: https://github.com/python/cpython/issues/59317"""
    parser = ToolParser()
    parser.add_argument("config")
    parser.add_argument("others", nargs="*")
    parser.add_argument("--json")
    args = parser.parse_args(line.split())
    assert (args.config, args.others) == ("run", rest)
    assert args.json == ("f" if "--json" in line else None)


def test_debug_shows_the_traceback(tool: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool("tools/print_config.py", "--debug", "none.yaml")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("Traceback")
    assert said.splitlines()[-1] == "error: none.yaml: no such file: none.yaml"


def ended_by(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_tool(main)
    return end.value.code, capsys.readouterr().err


def test_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = ended_by(KeyError("surprise"), capsys)
    assert status == 1
    assert said.startswith("Traceback")
    assert re.search(r"this is a bug in kernelwarehouse [\d.]+ \(Python .*torch", said)
    assert "report" in said.splitlines()[-1]


def test_a_name_that_is_no_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """What a file is called ends no command whose work is done."""
    run_tool(lambda: print(os.fsdecode(b"caf\xe9.jpg")))
    assert capsys.readouterr().out == "caf\\udce9.jpg\n"


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_by(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left", "free some space"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), ["/x/y", "permissions"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), ["/x", "expected a file"]),
        (OSError(errno.EMFILE, "Too many open files"), ["ulimit -n", "data.workers"]),
        (MemoryError(), ["out of memory", "lower batch_size"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["CUDA out of memory", "batch_size"]),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 b"),
            ["out of memory", "batch_size"],
        ),
        (
            RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "),
            ["loader process died", "data.workers"],
        ),
        (UserError("what was wrong"), ["what was wrong"]),
    ],
)
def test_errors_of_the_machine(
    error: Exception, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = ended_by(error, capsys)
    assert status == 2
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words)


def test_mistakes_found_in_loader_processes() -> None:
    """PyTorch wraps them in a traceback of the process."""

    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> None:
            raise DataError("image x.png cannot be read")

    with pytest.raises(DataError) as error:
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert answer(error.value) == "image x.png cannot be read"


def test_one_image_for_batch_norm() -> None:
    norm = torch.nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value") as error:
        norm(torch.zeros(1, 3, 1, 1))
    said = answer(error.value)
    assert said is not None
    assert "set batch_size (images of one process in one forward pass) to 2 or more" in said
    assert answer(ValueError("Expected something else")) is None


def test_a_full_disk_names_the_file(
    tool: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as end:
        tool("tools/analyze.py", R18, "--json", tmp_path / "costs.json")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said == f"error: {tmp_path}/costs.json: cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", [["tools/print_config.py", R18], ["-m", "kw", "--help"]])
def test_nobody_reads(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``| head -1``."""
    if words[0] != "-m":
        monkeypatch.setattr(subprocess, "Popen", Forked)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert done.stderr == b""
    assert done.returncode == 141


def test_a_terminal_that_is_closed_leaves_the_status() -> None:
    """The last message has no place then: the status alone says that the run can go on."""
    end = """
from kw.cli import run_tool
from kw.errors import Interrupted
def main():
    print("begun", flush=True)
    sys.stdin.read()  # until the terminal is closed
    raise Interrupted("SIGHUP", "epoch_1.pth")
import sys, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
run_tool(main)
"""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", end],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        said = b""
        while not said.endswith(b"\n"):  # else it is still being written
            said += os.read(ours, 99)
        os.close(theirs)
        os.close(ours)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 75


@pytest.mark.slow
def test_one_message_of_several_processes() -> None:
    """The first to fail speaks; torchrun's own summary points to it."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "tools/train.py", R18, "--launcher", "pytorch"),
            *("--cfg-options", "epochs=x"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert done.stderr.count("epochs = 'x'") == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "traceback : see the message above" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr  # torchrun's
    assert "kw/cli/" not in done.stderr
