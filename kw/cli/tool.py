"""What the command-line tools share: options, and answers to a user's mistakes.

A tool ends with status 0; 1 for a bug, with its traceback; 2 for a mistake of the user's, with one
message; 69 where another process of its run is missing; 75 where it was asked to end and saved its
work; 130 where it was interrupted. ``--debug`` shows the traceback of a mistake as well.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ..errors import EXIT_INTERRUPTED, EXIT_MISSING, Interrupted, MissingProcess, answer, writing
from ..version import __version__

_BUG = 1
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # 128 and the signal's number, as shells have it


class ToolParser(argparse.ArgumentParser):
    """A tool's parser, with ``--debug`` and ``--import``; its mistakes look like all others.

    Args:
        doc: the tool's docstring, with examples; the help shows it as it is.
        **kwargs: as for :class:`argparse.ArgumentParser`.
    """

    def __init__(self, doc: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("description", doc)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        # run_tool looks for it itself: a mistake may be found before there is a namespace.
        self.add_argument(
            "--debug", action="store_true", help="show the traceback of a mistake as well"
        )
        self.add_argument(
            "--import",
            dest="imports",
            action=_Import,
            metavar="MODULE",
            help="import a module of your own first, which registers what the configuration names",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but options may stand between the words of one argument."""
        if self._subparsers is not None:
            return super().parse_args(args, namespace)
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Answer a wrong command line; a setting that is given as an option is named."""
        if message.startswith("unrecognized arguments: "):
            message += _as_setting(message.removeprefix("unrecognized arguments: ").split())
        if _is_first_to_fail():
            print(f"error: {message}\n{self.format_usage().rstrip()}", file=sys.stderr)
        sys.exit(2)


def _as_setting(words: list[str]) -> str:
    """How to set what looks like a configuration's key: ``--epochs 3``."""
    from ..config.describe import key_hints
    from ..config.schema import Config

    name = words[0].lstrip("-").partition("=")[0].replace("-", "_")
    keys = [key for key in key_hints(Config) if key == name or key.endswith(f".{name}")]
    if not words[0].startswith("--") or not keys:
        return ""
    value = words[0].partition("=")[2] or (words[1] if len(words) > 1 else "VALUE")
    return f"; settings are given as --set {min(keys, key=len)}={value}"


class _Import(argparse.Action):
    # At once: the choices of other arguments may depend on it.
    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        from ..config.imports import GIVEN, import_modules

        import_modules([value], option or "--import")
        GIVEN.append(value)


def add_config_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """``CONFIG`` and :func:`add_options`."""
    parser.add_argument(
        "config",
        nargs=nargs,
        metavar="CONFIG",
        help="configuration file (YAML for a classifier, Python for a detector), or one's name "
        "(kw config --list)",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``."""
    parser.add_argument(
        "--cfg-options",
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings in place of the file's, e.g. data.root=/data/imagenet epochs=100",
    )


def number(
    kind: type[int] | type[float], minimum: float, maximum: float = math.inf
) -> Callable[[str], Any]:
    """The type of an argument that is a finite number within bounds, both allowed."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Also refuses nan, which compares with nothing.
        if value is None or not (minimum <= value <= maximum and math.isfinite(value)):
            name = "an integer" if kind is int else "a number"
            limit = f" and <= {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected {name} >= {minimum:g}{limit}"
            ) from None
        return value

    return read


def precision(text: str) -> str:
    """The type of an argument that names a number format: ``fp32`` is ``float32``, and so on."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(text, text)


def device(text: str) -> str:
    """The type of an argument that names a device that is here: ``cpu``, ``cuda``, ``cuda:N``."""
    import torch

    kind, colon, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no GPU"
        raise argparse.ArgumentTypeError(f"{text!r}: PyTorch sees {found} here; use cpu")
    return text


def output_file(text: str) -> Path:
    """The type of an argument that names a file to write: checked before the work, not after."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected the name of a file")
    _expect_room_for(path.parent, text)
    return path


def output_folder(text: str) -> Path:
    """The type of an argument that names a folder to write into; it need not be there yet."""
    _expect_room_for(Path(text), text)
    return Path(text)


def _expect_room_for(folder: Path, text: str) -> None:
    """Refuse a folder that is none, or that cannot be made or written into."""
    try:
        nearest = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    except OSError as error:  # a name that is too long
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: {nearest} is a file: expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: {nearest} cannot be written into")


def save_json(content: dict[str, Any] | list[Any], path: Path) -> None:
    """Write a tool's results; a UserError names a file that cannot be written."""
    from ..training.saving import write_json

    with writing(path):
        write_json(content, path)


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool and answer what goes wrong; see the head of this module."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be of other encodings
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except Interrupted as error:
        _end(str(error), EXIT_INTERRUPTED)
    except MissingProcess as error:
        _end(f"error: {error}", EXIT_MISSING)
    except KeyboardInterrupt:
        _end("interrupted", _INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(_PIPE_CLOSED)
        message = answer(error)
        if message is not None:
            _end(f"error: {message}", 2)
        _end(
            f"this is a bug in kernelwarehouse {__version__} ({_versions()}): please report it to "
            "the project, with the lines above and the command",
            _BUG,
        )


def _end(message: str, status: int) -> NoReturn:
    if _is_first_to_fail():
        with suppress(OSError):  # a terminal that is closed
            if status == _BUG or "--debug" in sys.argv:
                traceback.print_exc()
            print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _is_first_to_fail() -> bool:
    """Whether this process is the first to fail of those that torchrun started on this machine.

    It alone speaks: the others usually say the same, or that they lost the first one. torchrun
    gives its processes a folder of their own, anew with every restart, and quotes in the summary at
    its end what a process left in its file there.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        os.close(os.open(Path(error_file).parents[1] / "answered", os.O_CREAT | os.O_EXCL))
        when = {"timestamp": str(int(time.time()))}
        words = {"message": "see the message above", "extraInfo": when}
        Path(error_file).write_text(json.dumps({"message": words}))
    except FileExistsError:
        return False
    except (OSError, IndexError):
        return True
    return True


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more, as after ``| head``; it then goes nowhere."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            return False
        # Or Python complains when it flushes what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no such function, or no such file
        return False
    return True


def _versions() -> str:
    names = ("torch", "torchvision", "timm", "mmengine", "mmdet")
    loaded = [(name, getattr(sys.modules.get(name), "__version__", None)) for name in names]
    found = ", ".join(f"{name} {version}" for name, version in loaded if version is not None)
    return f"Python {platform.python_version()}, {found}, {platform.platform(terse=True)}"
