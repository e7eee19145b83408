"""Folders of generated data that are there as a whole or not at all.

A marker file inside says that a folder is complete and with which settings it was written. A
program that is run again then keeps the folder. It never changes what it did not write.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from kw.data.reading import DataError
from kw.errors import answer


@contextmanager
def whole_folder(
    root: Path, marker: str, settings: Mapping[str, float], what: str
) -> Iterator[Path | None]:
    """A folder to fill, which becomes ``root`` when the block ends without an error.

    Args:
        root: absolute path.
        marker: name of the file in it that holds the settings.
        settings: what the content depends on.
        what: the content, for the message.

    Yields:
        An empty folder beside ``root``; ``None`` where ``root`` was written with these settings.

    Raises:
        DataError: ``root`` has other content, or was written with other settings.
    """
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        _check_written(root, marker, settings, what)
        yield None
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as temporary:
        partial = Path(temporary) / root.name
        partial.mkdir()
        yield partial
        (partial / marker).write_text(json.dumps(settings) + "\n")
        if root.exists():
            root.rmdir()
        shutil.move(partial, root)


def _check_written(root: Path, marker: str, settings: Mapping[str, float], what: str) -> None:
    if not (root / marker).is_file():
        raise DataError(
            f"{root} exists and was not written by this program (it has no {marker}): "
            "name another folder"
        )
    found = json.loads((root / marker).read_text())
    if found != settings:
        raise DataError(
            f"{root} has the {what} with {found}, not {dict(settings)}: "
            "name another folder or delete it"
        )


def run_writer(
    write: Callable[..., Mapping[str, int]], summary: str, arguments: Sequence[str] | None = None
) -> int:
    """The command line of a function that writes such a folder: run it and print one line.

    Args:
        write: what it needs is positional; whole numbers and switches that it has defaults for are
            options. Their help is what its docstring says of them. It returns the numbers of
            images by split.
        summary: what is printed, a format of the arguments and the numbers.
        arguments: the command line; left out, the process's.

    Returns:
        The exit status: 0, or 2 for a mistake of the user.
    """
    doc = (inspect.getdoc(write) or "").replace("``", "")
    module = sys.modules[write.__module__].__spec__
    parser = argparse.ArgumentParser(
        prog=f"python -m {module.name if module else write.__module__}",
        description=doc.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, parameter in inspect.signature(write).parameters.items():
        found = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", doc, re.MULTILINE)
        text = " ".join(found[1].split()) if found else None
        option, default = f"--{name.replace('_', '-')}", parameter.default
        if default is parameter.empty:
            parser.add_argument(name, help=text)
        elif isinstance(default, bool):
            parser.add_argument(option, action="store_true", help=text)
        else:
            parser.add_argument(option, type=int, default=default, metavar="N", help=text)
    options = vars(parser.parse_args(arguments))
    try:
        counts = write(**options)
    except (DataError, ImportError, OSError) as error:
        print(f"error: {answer(error) or error}", file=sys.stderr)
        return 2
    print(summary.format(**{**options, **counts}))
    return 0
