"""Images inside one file: a packed set (``kw pack``), a ZIP or TAR file.

Members are stored as they are, not compressed, so that each is a range of bytes of a file that is
mapped into memory: read in any order, by any number of processes. A packed set is a ZIP file with
an index of its own (:mod:`.packing`), which is read in one piece; of other archives the list of
members is read when the set is opened.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kw.data.listing import Listing
from kw.data.reading import BadImageError, DataError
from kw.data.walk import describe, is_hidden, is_image
from kw.errors import say
from kw.registry import DATASETS

INDEX = re.compile(rb"kw-pack 1 (\d+) (\d+) (\d+)")
"""A packed set's comment: where its index begins, its bytes, its CRC-32."""


SETTINGS = "pack.json"
"""A packed set's first member: how it was packed."""

_MAPPED = 128  # files at once: each takes a file handle, of which a process often has 1,024


class Member(NamedTuple):
    """An image in an archive."""

    name: str
    archive: int
    """which of the files"""
    start: int
    """first byte"""
    size: int
    """bytes"""
    crc: int | None = None
    """CRC-32 of these bytes"""


class Names(Sequence[str]):
    """Strings in two arrays, which forked processes share.

    Reading a list of strings writes their reference counts: every process would copy its pages.

    Args:
        text: all of them, in UTF-8, one after another.
        ends: where each ends.
        prefix: what stands before each.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray, prefix: str = "") -> None:
        self.text, self.ends, self._prefix = text, ends, prefix

    @classmethod
    def of(cls, names: Iterable[str], prefix: str = "") -> Names:
        """Of strings."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        return cls(
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            np.cumsum([len(each) for each in encoded], dtype=np.int64),
            prefix,
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = self.ends[index - 1] if index else 0
        text = self.text[start : self.ends[index]].tobytes()
        return self._prefix + text.decode("utf-8", "surrogateescape")


class Members(Sequence[Any]):
    """The contents of members of archives, each a range of bytes in a mapped file.

    Args:
        archives: the files.
        names: of the members, for messages.
        archive: int32, which file each is in; left out, the first.
        starts: int64, first byte of each.
        sizes: int64, bytes of each.
        crcs: uint32, the CRC-32 of each. A process checks it when it first reads the member.
        shapes: int32 ``[members, 2]``: height and width of pixels, the last bytes of the member;
            0 where it is a file's content.
    """

    def __init__(
        self,
        archives: Sequence[Path],
        names: Sequence[str],
        starts: np.ndarray,
        sizes: np.ndarray,
        archive: np.ndarray | None = None,
        crcs: np.ndarray | None = None,
        shapes: np.ndarray | None = None,
    ) -> None:
        self.archives, self.names = list(archives), names
        self.starts, self.sizes, self.archive = starts, sizes, archive
        self.crcs, self.shapes = crcs, shapes
        self._checked = np.zeros(len(starts) if crcs is not None else 0, dtype=bool)
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # another process maps the files itself

    def __getitem__(self, index: Any) -> Any:
        """The content of a member: bytes, or pixels, uint8 ``[h, w, 3]``.

        Raises:
            BadImageError: the bytes are not those that were stored.
            DataError: the archive cannot be opened.
        """
        start, size = int(self.starts[index]), int(self.sizes[index])
        data = memoryview(self._map(index))[start : start + size]
        if len(data) < size:
            raise BadImageError.of(self.names[index], "the archive ends too early")
        if self.crcs is not None and not self._checked[index]:
            if zlib.crc32(data) != int(self.crcs[index]):
                raise BadImageError.of(self.names[index], "its checksum is another one")
            self._checked[index] = True
        if self.shapes is None or not self.shapes[index, 0]:
            return data
        height, width = (int(n) for n in self.shapes[index])
        return np.frombuffer(data[-height * width * 3 :], np.uint8).reshape(height, width, 3)

    def _map(self, index: int) -> mmap.mmap:
        place = 0 if self.archive is None else int(self.archive[index])
        if place not in self._maps:
            if len(self._maps) >= _MAPPED:
                del self._maps[next(iter(self._maps))]
            path = self.archives[place]
            with _explained(path), open(path, "rb") as file:
                # To copy: torch asks for memory that may be written to; nothing is written.
                self._maps[place] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[place]


@DATASETS.register("zip")
def list_zip(root: Path, split: str) -> Listing:
    """A ZIP file of ``split/CLASS/**``: one that ``kw pack`` wrote, or another one whose members
    are not compressed.

    Raises:
        DataError: it is no such file.
    """
    root = root.expanduser()
    with _explained(root):
        with open(root, "rb") as file:
            begin = file.read(30 + len(SETTINGS))
            file.seek(max(0, file.seek(0, os.SEEK_END) - 200))
            index = INDEX.search(file.read())  # in the ZIP file's comment
        if index is not None:
            return _packed(root, split, *map(int, index.groups()))
        if begin.endswith(SETTINGS.encode()):
            raise DataError(f"{root} ends too early: a packed set that was cut; copy it again")
        with zipfile.ZipFile(root) as archive:
            return _of_folders(root, split, _zip_members(root, archive))


@DATASETS.register("tar")
def list_tar(root: Path, split: str) -> Listing:
    """A TAR file, not compressed, of ``split/CLASS/**``; or a folder with ``split.tar`` of
    ``CLASS/**``.

    Raises:
        DataError: it is no such file.
    """
    root = root.expanduser()
    file, inside = (root / f"{split}.tar", False) if root.is_dir() else (root, True)
    with opened_tar(file) as archive:
        found = [Member(_plain(m.name), 0, m.offset_data, m.size) for m in tar_files(archive)]
        found += [Member(f"{_plain(m.name)}/", 0, 0, 0) for m in archive.getmembers() if m.isdir()]
    return _of_folders(file, split if inside else "", found)


@contextmanager
def opened_tar(file: Path) -> Iterator[tarfile.TarFile]:
    """A TAR file, not compressed; a DataError for what is none."""
    with _explained(file), tarfile.open(file, "r:") as archive:
        yield archive


def tar_files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a TAR file, hard links among them.

    Raises:
        DataError: it is cut or damaged, or a file's zeros are left out.
    """
    files: dict[str, tarfile.TarInfo] = {}
    links, name = 0, os.fsdecode(archive.name or "")
    for member in archive:
        if member.issparse():
            raise DataError(f"{name}: {member.name} has holes; write the archive without --sparse")
        if member.islnk() and member.linkname in files:
            target = files[member.linkname]
            member.offset_data, member.size = target.offset_data, target.size
        elif not member.isfile():
            links += member.issym() or member.islnk()
            continue
        files[member.name] = member
        yield member
    # tarfile takes a damaged header, and the end of the file, for the end of the archive.
    stream: Any = archive.fileobj
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{name}: cut or damaged after {len(files)} files; copy it again")
    while rest := stream.read(2**20):
        if rest.count(0) < len(rest):
            raise DataError(
                f"{name}: more follows its end after {len(files)} files, as of archives written "
                "one after another; write one archive of all (tar --concatenate)"
            )
    if links:
        say(f"{name}: left out: {links} links")


def _of_folders(archive: Path, split: str, members: Iterable[Member]) -> Listing:
    """``split/CLASS/**``, in the order in which a folder is listed."""
    before = f"{split}/" if split else ""
    left_out: Counter[str] = Counter()
    found: dict[str, Member] = {}  # by the name inside of the split
    folders: set[str] = set()  # of classes
    for member in members:
        inside = member.name.removeprefix(before)
        name, slash, _ = inside.partition("/")
        if not member.name.startswith(before) or not name:
            continue
        if slash and not is_hidden(name):
            folders.add(name)
        if not inside.endswith("/"):
            left_out["files whose name comes again"] += inside in found
            found[inside] = member  # the last, as when archives are unpacked
    kept: list[tuple[str, Member]] = []
    for inside, member in found.items():
        parts = inside.split("/")
        if len(parts) == 1:
            left_out["files beside the class folders"] += 1
        elif any(map(is_hidden, parts)):
            left_out["hidden files"] += 1
        elif not is_image(inside):
            left_out[f"*{os.path.splitext(inside)[1].lower()}"] += 1
        else:
            kept.append((parts[0], member))
    left_out = +left_out
    if left_out:
        say(f"{archive}: left out: {describe(left_out)}")
    if not kept:
        raise DataError(f"{archive}: expected images as {before}CLASS/NAME, found none")
    classes = sorted({name for name, _ in kept})
    empty = sorted(folders - set(classes))
    if empty:
        raise DataError(
            f"{archive}: {len(empty)} of {len(folders)} class folders in {before or 'it'} have no "
            f"image: {', '.join(empty[:5])}"
        )
    places = {name: place for place, name in enumerate(classes)}
    kept.sort(key=lambda each: (each[0], *os.path.split(each[1].name)))
    labels = [places[name] for name, _ in kept]
    return list_archived([archive], [member for _, member in kept], labels, classes)


def list_archived(
    archives: Sequence[Path], members: Sequence[Member], labels: Sequence[int], classes: list[str]
) -> Listing:
    """A listing of members of archives."""
    several = len(archives) > 1
    prefix = "" if several else f"{archives[0]}/"
    names = Names.of(
        (f"{archives[m.archive]}/{m.name}" if several else m.name for m in members), prefix
    )
    crcs = [m.crc for m in members]
    files = Members(
        archives,
        names,
        np.array([m.start for m in members], dtype=np.int64),
        np.array([m.size for m in members], dtype=np.int64),
        np.array([m.archive for m in members], dtype=np.int32) if several else None,
        None if None in crcs else np.array(crcs, dtype=np.uint32),
    )
    return Listing(files, labels, classes, names)


def _zip_members(root: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    with open(root, "rb") as file:
        for info in archive.infolist():
            if info.is_dir():
                yield Member(_plain(info.filename), 0, 0, 0)
                continue
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise DataError(
                    f"{root}: {info.filename} is compressed or encrypted; unpack the file, or "
                    "write it with kw pack"
                )
            file.seek(info.header_offset + 26)  # a local header's lengths are its own
            name, extra = struct.unpack("<2H", file.read(4))
            start = info.header_offset + 30 + name + extra
            yield Member(_plain(info.filename), 0, start, info.file_size, info.CRC)


def _packed(root: Path, split: str, start: int, size: int, crc: int) -> Listing:
    with open(root, "rb") as file:
        file.seek(start)
        content = file.read(size)
    if zlib.crc32(content) != crc:
        raise DataError(f"{root}: its index is damaged; write it again with kw pack")
    index = np.load(io.BytesIO(content), allow_pickle=False)
    meta = json.loads(str(index["meta"]))
    if split not in meta["splits"]:
        raise DataError(f"{root} has no {split}; it has {', '.join(meta['splits'])}")
    of = {key.partition("/")[2]: index[key] for key in index if key.startswith(f"{split}/")}
    names = Names(of["text"], of["ends"], f"{root}/")
    files = Members([root], names, of["starts"], of["sizes"], None, of["crcs"], of.get("shapes"))
    labels = of["labels"]
    return Listing(
        files, labels if labels.ndim == 2 else labels.tolist(), meta["splits"][split], names
    )


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Errors of archives as :class:`DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data.root {file}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, tarfile.TarError, struct.error) as error:
        raise DataError(
            f"{file}: {error}; expected an archive that is whole and not compressed"
        ) from error


def _plain(name: str) -> str:
    """A member's name without a leading ``./``."""
    return name.removeprefix("./")
