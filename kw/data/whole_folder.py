"""Folders of generated data that are there as a whole or not at all.

A marker file inside says that a folder is complete and with which settings it was written. A
program that is run again then keeps the folder. It never changes what it did not write.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kw.data.dataset import DataError

__all__ = ["is_written", "whole_folder"]


def is_written(root: Path, marker: str, settings: Mapping[str, float], what: str) -> bool:
    """Whether ``root`` is already what would be written.

    Args:
        root: the folder.
        marker: name of the file in it that holds the settings.
        settings: the settings it should have been written with.
        what: what it holds, for the message.

    Returns:
        False if ``root`` is absent or empty.

    Raises:
        DataError: it has other content, or was written with other settings.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
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
    return True


@contextmanager
def whole_folder(root: Path, marker: str, settings: Mapping[str, float]) -> Iterator[Path]:
    """A folder to fill, which becomes ``root`` when the block ends without an error.

    Args:
        root: absolute path of a folder that is absent or empty.
        marker: name of the file in it that will hold the settings.
        settings: what the content depends on.

    Yields:
        An empty folder beside ``root``.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as temporary:
        partial = Path(temporary) / root.name
        partial.mkdir()
        yield partial
        (partial / marker).write_text(json.dumps(settings) + "\n")
        if root.exists():
            root.rmdir()
        shutil.move(partial, root)
