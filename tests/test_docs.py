"""The code in README.md and docs/: Python runs, every command is one that its tool understands."""

from __future__ import annotations

import argparse
import ast
import configparser
import functools
import importlib
import importlib.util
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("markdown_it", reason="the docs extra is not installed")

from doc_pages import (
    IGNORED,
    PAGES,
    PYTHON,
    ROOT,
    SHELL,
    Block,
    Command,
    Recorder,
    read_blocks,
)
from torch import distributed, nn

from kw import get_temperature, registry
from kw.cli import ToolParser, command_of
from kw.config import ConfigError
from kw.errors import UserError
from kw.runs import load_run
from kw.study.files import load_study
from kw.warehouse import KWLayer

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
TRAIN = "tools/train.py"
EARLIER = {".py": "configs/demo/overfit_coco.py", ".yaml": "configs/demo/resnet18.yaml"}


@pytest.fixture
def process_group(tmp_path):
    """A world of one, for the block on several GPUs."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


class _Parsed(Exception):
    """Ends a tool once its command line is understood; carries what it understood."""


def parsed(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A command line of a tool as the tool's own parser reads it.

    Raises:
        SystemExit: it refuses it.
    """

    def stop(self: argparse.ArgumentParser, *_: Any) -> None:
        raise _Parsed(argparse.ArgumentParser.parse_args(self))

    with monkeypatch.context() as patch:
        patch.setattr(ToolParser, "parse_args", stop)
        patch.setattr(sys, "argv", list(words))
        main = main_of(words)
        try:
            main()
        except _Parsed as understood:
            return understood.args[0]
        except SystemExit as ended:
            if ended.code:
                raise
    return argparse.Namespace()  # --help ends the tool


def main_of(words: tuple[str, ...]) -> Callable[[], None]:
    """What a command line calls: a tool's main, or that of a command of kw."""
    if words[0] != "kw":
        return runpy.run_path(str(ROOT / words[0]), run_name="read")["main"]
    name, module, rest = command_of(words[1:])
    sys.argv = [name, *rest]
    return importlib.import_module(f"kw.cli.{module}").main


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command is none that could run."""
    program, *words = command.words
    if program in ("python", "torchrun", "kw"):
        if program == "kw":
            words = ["kw", *words]
        if words[:3] == ["kw", "study", "run"] and command.block.page.stem != "results":
            load_study(words[3])  # results.md has records of earlier files
        if program == "torchrun":
            from torch.distributed.run import get_args_parser

            run = get_args_parser().parse_args(words)
            words = [run.training_script, *run.training_script_args]
            if run.module:
                words = ["-m", *words]
        check_python(tuple(words), monkeypatch)
    elif program == "sbatch":
        at = words.index("scripts/train.slurm")
        options = dict(command.variables).get("OPTIONS", "").split()
        for config in words[at + 1 :]:
            check_python((TRAIN, config, "--launcher", "slurm", *options), monkeypatch)
    elif program == "scripts/train.sh":
        check_python((TRAIN, *words, "--launcher", "pytorch", "--resume"), monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets), words
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = [e for word in words for e in re.findall(r"\[(.+)\]", word) for e in e.split(",")]
        assert set(extras) <= set(setup["options.extras_require"]), words
    else:  # a script of this project's: what it is called with stands in its own usage
        text = (ROOT / program).read_text()
        assert all(word in text for word in words if word.startswith("--")), words


def check_python(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = words
    if script == "-m" and arguments[0] == "kw":
        check_python(tuple(arguments), monkeypatch)
    elif script == "-m":
        assert importlib.util.find_spec(arguments[0]), words
    elif script == "kw" or script.startswith(("tools/", "scripts/")):
        args = vars(parsed(words, monkeypatch))
        options = args.get("cfg_options", [])
        named = [args.get("config"), *(args.get("configs") or ()), *(args.get("sets") or ())]
        for config in named:
            kind = Path(str(config)).suffix
            if str(config).startswith("work_dirs/"):  # a run of an earlier block leaves one like it
                config = EARLIER.get(kind)
            if kind in EARLIER:
                loaded(str(config), tuple(options), kind)
    elif not Path(script).exists():
        text = (ROOT / script).read_text()
        assert all(word in text for word in arguments if word.startswith("--")), words


def loaded(config: str, options: tuple[str, ...], kind: str) -> None:
    """Every key of a command's options exists, and has a value that it may have."""
    if kind == ".py":
        pytest.importorskip("mmdet", exc_type=ImportError)
    load_run(config, options)


def shell_blocks(page: Path) -> Iterator[Block]:
    return (b for b in read_blocks(page) if b.language in SHELL and b.mark != "file")


@each_page
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    for block in read_blocks(page):
        known = block.language in (*SHELL, *PYTHON, *IGNORED) or block.mark
        assert known, f"{block.place}: ```{block.language}: neither run nor marked"


@pytest.fixture
def own_registries(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page registers is gone after its test; its modules are imported anew by another."""
    for entries in vars(registry).values():
        if isinstance(entries, registry.Registry):
            list(entries)  # the project's own are loaded before
            monkeypatch.setattr(entries, "entries", dict(entries.entries))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{recorder.folder}{os.sep}"):
            del sys.modules[name]


@each_page
@pytest.mark.usefixtures("own_registries")
def test_commands(page: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash reads the page's commands, and every tool its arguments, files and settings."""
    for block in read_blocks(page):
        if block.mark == "file":
            recorder.write(block)
    add_written_files(recorder)
    monkeypatch.chdir(recorder.folder)
    monkeypatch.syspath_prepend(str(recorder.folder))
    for block in shell_blocks(page):
        if not block.runs and not re.search(r"\b(tools|scripts)/", block.code):
            continue
        for command in recorder.commands(block):
            try:
                check(command, monkeypatch)
            except (SystemExit, UserError, AssertionError, OSError) as error:
                pytest.fail(f"{block.place}: {' '.join(command.words)}\n{error}")


def add_written_files(recorder: Recorder) -> None:
    """Tools are looked up where a reader starts them: beside the configurations."""
    (recorder.folder / "tools").symlink_to(ROOT / "tools")
    (recorder.folder / "docs").mkdir()
    (recorder.folder / "docs/benchmarks").symlink_to(ROOT / "docs/benchmarks")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("python tools/train.py configs/demo/resnet18.yaml --work-folder x", "SystemExit"),
        ("python tools/train.py configs/demo/resnet19.yaml", "ConfigError"),
        ("python tools/train.py configs/demo/resnet18.yaml --cfg-options epoch=3", "ConfigError"),
        ("kw study run configs/demo/nowhere.yaml", "ConfigError"),
        ("make everything", "AssertionError"),
        ("pip install '.[all]'", "AssertionError"),
        ("scripts/prepare_coco.sh --verify data/coco", "AssertionError"),
        ("torchrun --processes 8 tools/train.py configs/demo/resnet18.yaml", "SystemExit"),
    ],
)
def test_stale_commands_are_found(code, said, recorder, monkeypatch) -> None:
    monkeypatch.chdir(recorder.folder)
    (command,) = recorder.commands(Block(PAGES[0], 1, "bash", code))
    kinds = {"ConfigError": ConfigError, "AssertionError": AssertionError, "SystemExit": SystemExit}
    with pytest.raises(kinds[said]):
        check(command, monkeypatch)


def test_bash_makes_the_commands(recorder: Recorder) -> None:
    code = (
        "LIST='a=1 b=2'  # two words\n"
        "NODES=2 scripts/train.sh configs/demo/{resnet18,kw_resnet18_1x}.yaml\n"
        "python tools/test.py CONFIG \\\n    'x y' --cfg-options $LIST\n"
    )
    first, second = recorder.commands(Block(PAGES[0], 1, "bash", code))
    names = ("configs/demo/resnet18.yaml", "configs/demo/kw_resnet18_1x.yaml")
    assert first.words == ("scripts/train.sh", *names)
    assert first.variables == (("NODES", "2"),)
    assert second.words[2:] == (names[1], "x y", "--cfg-options", "a=1", "b=2")
    with pytest.raises(AssertionError, match="mark the block"):
        recorder.commands(Block(PAGES[0], 1, "bash", "curl example.org"))


def run_python(page: Path, names: dict[str, Any]) -> None:
    """Run the page's Python blocks, one after another, in one module."""
    for block in read_blocks(page):
        if block.language in PYTHON and block.mark != "file":
            # Errors name the page's line.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.runs:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    exec(code, names)


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "converting"], ids=lambda p: p.stem)
@pytest.mark.usefixtures("own_registries")
def test_python(page: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in read_blocks(page):
        if block.mark == "file":
            recorder.write(block)
    monkeypatch.chdir(recorder.folder)
    monkeypatch.syspath_prepend(str(recorder.folder))
    # Random values take most of the seconds of large models.
    for name in ("kaiming_normal_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: nn.init.constant_(tensor, 0.01))
    monkeypatch.setattr(timm, "create_model", narrow(timm.create_model))
    run_python(page, {"__name__": "page", **BEFORE.get(page.stem, dict)()})


class _Staged(nn.Module):
    """Names as in the README's plan."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        block = nn.ModuleDict({f"conv{i}": nn.Conv2d(8, 8, 3) for i in (1, 2)})
        self.stages = nn.ModuleList([nn.ModuleList([block])])


def before_readme() -> dict[str, Any]:
    """What the README's blocks take for granted."""
    path = Path("work_dirs/kw_resnet50_4x/best.pth")
    path.parent.mkdir(parents=True)
    torch.save(timm.create_model("kw_resnet50_4x").state_dict(), path)
    batch = (torch.randn(2, 3, 64, 64), torch.randint(10, (2,)))
    return {"loader": [batch] * 2, "warm_up_steps": 2, "my_network": _Staged()}


def before_data() -> dict[str, Any]:
    """A set of grey images."""
    for name in ("a", "b"):
        folder = Path("data/grey/train", name)
        folder.mkdir(parents=True)
        Image.new("L", (30, 40), 77).save(folder / "0.png")
    return {}


BEFORE: dict[str, Callable[[], dict[str, Any]]] = {"README": before_readme, "data": before_data}


def narrow(create: Callable[..., nn.Module], **more: Any) -> Callable[..., nn.Module]:
    """Layers and names of a ResNet are the page's, its widths are not."""

    def build(name: str, **settings: Any) -> nn.Module:
        if "resnet" in name:
            settings |= {"channels": [16, 16, 32, 32], **more}
        return create(name, **settings)

    return build


def test_converting_md(tmp_path, process_group, monkeypatch):
    page = ROOT / "docs" / "converting.md"
    # What is traced is the same, and no compiler is needed.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shallow = narrow(timm.create_model, layers=[1, 1, 1, 1])
    monkeypatch.setattr(timm, "create_model", shallow)
    batch = (torch.randn(4, 3, 64, 64), torch.randint(10, (4,)))
    names = {"loader": [batch] * 2, "epochs": 1, "path": tmp_path / "model.pth"}
    names["__name__"] = "converting"
    run_python(page, names)

    assert names["step"] == 1
    assert names["loss"].isfinite()
    assert names["report"].refused
    assert get_temperature(names["average"].module) == 0.5
    assert get_temperature(names["again"]) == 0
    assert not names["again"].warehouses["layer1"].cells.requires_grad
    assert any(isinstance(m, KWLayer) for m in names["backbone"].modules())


def imports_at_start(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.Try, ast.With)):
            yield from imports_at_start(node.body)


def test_a_room_imports_only_rooms_above_it():
    """The table of docs/architecture.md is the order of the packages."""
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `kw/(\w+)/`", table, re.MULTILINE)
    assert {path.parent.name for path in ROOT.glob("kw/*/__init__.py")} == set(rooms)
    seen = 0
    for path in ROOT.glob("kw/*/**/*.py"):
        package = path.relative_to(ROOT).parent.parts
        for node in imports_at_start(ast.parse(path.read_text(encoding="utf-8")).body):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                start = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
                where = ".".join(filter(None, (start, node.module)))
                names = [f"{where}.{name}" for name in names]
            for name in names:
                room = name.split(".")[1] if name.startswith("kw.") else ""
                if room in rooms:
                    seen += room != package[1]
                    assert rooms.index(room) <= rooms.index(package[1]), f"{path}:{node.lineno}"
    assert seen > 500
