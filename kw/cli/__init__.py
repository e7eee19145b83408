"""``kw COMMAND``: every tool of this project under one name, the same as ``python -m kw COMMAND``.

A command is a module with a ``main``; it is imported when it is called, so that the help comes at
once. ``tools/*.py`` are the same commands by path.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from ..errors import did_you_mean
from ..version import __version__
from .tool import ToolParser, add_config_options, number, output_file, run_tool

__all__ = [
    "COMMANDS",
    "ToolParser",
    "add_config_options",
    "command_of",
    "main",
    "number",
    "output_file",
    "run_tool",
]

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train and evaluate a classifier or a detector"),
    "test": ("test", "evaluate a run, or a checkpoint with a configuration"),
    "pack": ("pack", "put a data set into one file that is read fast"),
    "predict": ("predict", "classify images, or find objects in them"),
    "export": ("export", "write ONNX, OpenVINO, ExecuTorch and others, verified"),
    "push": ("push", "publish a model on the Hugging Face Hub, with its card"),
    "pull": ("pull", "bring a model of the hub into a folder"),
    "convert network": ("convert_network", "a static network's checkpoint to a dynamic one's"),
    "convert released": (
        "convert_checkpoint",
        "the authors' released checkpoint to this project's",
    ),
    "inspect costs": ("analyze", "parameters, multiply-adds and warehouses of networks"),
    "inspect backends": ("explain_backends", "which back end computes each layer, and why"),
    "inspect annotations": ("check_coco", "all that is wrong with a set in COCO's format"),
    "benchmark networks": ("benchmark", "time and memory of dynamic beside static networks"),
    "benchmark loading": ("measure_loading", "how fast training batches come"),
    "benchmark exports": ("compare_exports", "accuracy and speed of exported files"),
    "visualize": ("visualize", "pictures of cells, coefficients, batches, detections"),
    "study run": ("run_study", "train every row of a study; goes on where it stopped"),
    "study summarize": ("summarize_study", "a study's finished runs in one file and plot"),
    "study compare": ("compare_runs", "a table and a plot of single runs"),
    "study reproduce": ("reproduce", "a published table: list, train, show both figures"),
    "doctor": ("doctor", "check this installation and machine; for bug reports"),
    "config": ("print_config", "list configurations, print one resolved, explain the keys"),
}
"""The module of a command, and when to use it."""


def main(words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: the command line without the program's name; left out, the process's.
    """
    words = list(sys.argv[1:] if words is None else words) or ["--help"]
    run_tool(lambda: _run(words))


def _run(words: Sequence[str]) -> None:
    if words[0] in ("-h", "--help"):
        print(_help())
        return
    if words[0] == "--version":
        print(f"kernelwarehouse {__version__}")
        return
    name, module, rest = command_of(words)
    if module is None:
        print(_help(f"{words[0]} "))
        return
    sys.argv = [name, *rest]
    importlib.import_module(f".{module}", __name__).main()


def command_of(words: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """What a command line means: the command's name, its module, and its arguments.

    The module is None where the help of a group is asked for. Ends the program with status 2 where
    there is no such command.
    """
    first, *rest = words
    if first in COMMANDS:
        return f"kw {first}", COMMANDS[first][0], rest
    group = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
    if not group:
        _refuse("command", first, dict.fromkeys(name.partition(" ")[0] for name in COMMANDS))
    if not rest or rest[0] in ("-h", "--help"):
        return f"kw {first}", None, []
    if rest[0] not in group:
        _refuse(f"{first} command", rest[0], group)
    return f"kw {first} {rest[0]}", COMMANDS[f"{first} {rest[0]}"][0], rest[1:]


def _refuse(kind: str, word: str, known: Collection[str]) -> NoReturn:
    hint = did_you_mean(word, known)
    print(f"error: no {kind} {word!r}{hint} (there are: {', '.join(known)})", file=sys.stderr)
    sys.exit(2)


def _help(group: str = "") -> str:
    lines = ["usage: kw COMMAND [ARGUMENTS]; kw COMMAND --help says more", ""]
    for name, (_, use) in COMMANDS.items():
        if name.startswith(group):
            lines.append(f"  {f'kw {name}':26s} {use}")
    return "\n".join(lines)
