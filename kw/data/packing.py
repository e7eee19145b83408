"""Packed sets: all images of a data set in one ZIP file with an index (:mod:`.archives` reads it).

Members are stored, not compressed, in the order in which the set is listed, so that training on a
packed set draws the same images in the same order as on the set itself. Any program that reads ZIP
files reads it; ``unzip -t`` checks it. The index, its last member, has for every split where each
image lies, its checksum, its label and its name; the file's comment says where the index is.

Writing goes on where it stopped: the members that are whole are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from kw.data.archives import INDEX, SETTINGS, Names
from kw.data.listing import Listing, Stored
from kw.data.reading import BadImageError, DataError, read_image
from kw.errors import say

FORMATS = ("jpeg", "raw", "keep")
_INDEX_NAME = "index.npz"
_LONGEST = 65500  # pixels, of libjpeg
_HEADER = struct.Struct("<4s5H3L2H")  # of a ZIP file's member
_DATE = (1980, 1, 1, 0, 0, 0)  # no clock: the same set gives the same file


class Packing(NamedTuple):
    """How images are stored."""

    format: str = "jpeg"
    """``"jpeg"``: encoded again; ``"raw"``: pixels, as NumPy's files; ``"keep"``: files as they
    are"""
    side: int | None = 256
    """shorter side in pixels, to which larger images are resized; not with ``"keep"``"""
    quality: int = 90
    """of JPEG"""
    upright: bool = True
    """turn images as their EXIF data say; not with ``"keep"``"""


def pack(
    listings: Mapping[str, Listing], root: Path, out: Path, packing: Packing, workers: int = 0
) -> int:
    """Write a packed set.

    An image that cannot be read, or is too long for a JPEG file, is stored as it is, and named in
    a message: training and testing meet it as in the set itself.

    Args:
        listings: of each split.
        root: the set; names in it are relative to ``root/SPLIT`` where they lie there.
        out: the file; ``out.part`` until it is whole, and where writing goes on.
        packing: how images are stored.
        workers: processes that read and encode.

    Returns:
        How many images of those that were written now were stored as they are.

    Raises:
        DataError: ``out`` exists; ``out.part`` is no packed set, or of another set or settings; two
            images would have one name; an array is none of RGB in bytes.
    """
    if out.exists():
        raise DataError(f"{out} exists: name another file, or delete it")
    part = out.with_name(f"{out.name}.part")
    splits = [_Split(split, each, root, packing) for split, each in listings.items()]
    settings = json.dumps({**packing._asdict(), "set": _digest(splits)}).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with open(part, "r+b") as file:
        whole, end = _whole_members(file)
        file.seek(0)
        head = file.read(_HEADER.size + len(SETTINGS))
        if len(head) == _HEADER.size + len(SETTINGS) and not head.endswith(SETTINGS.encode()):
            raise DataError(f"{part} is no packed set: name another file, or delete it")
        if whole and file.read(whole[0].file_size) != settings:
            raise DataError(f"{part} was begun with another set or other settings: delete it")
        file.truncate(end)
        file.seek(end)
        with zipfile.ZipFile(file, "w") as archive:
            for info in whole:
                archive.infolist().append(info)  # its members are listed when it is closed
                archive.NameToInfo[info.filename] = info
            if not whole:
                archive.writestr(zipfile.ZipInfo(SETTINGS, _DATE), settings)
            bad = _write(archive, ConcatDataset(splits), max(len(whole) - 1, 0), workers)
            _write_index(archive, file, splits)
    part.rename(out)
    return bad


def _digest(splits: Sequence[_Split]) -> str:
    """Of all names, labels and classes."""
    found = hashlib.blake2b(digest_size=16)
    for each in splits:
        found.update(repr((each.split, list(each.listing.classes))).encode())
        found.update(np.asarray(each.listing.labels).astype(np.int64).tobytes())
    for each in splits:
        for index in range(len(each)):
            found.update(each.name(index).encode() + b"\0")
    return found.hexdigest()


def _write(archive: zipfile.ZipFile, items: ConcatDataset[Any], done: int, workers: int) -> int:
    """Write the members from number ``done`` on; returns the number of unreadable images."""
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=16,
        sampler=range(done, len(items)),
        num_workers=workers,
        collate_fn=list,
    )
    bad = 0
    with tqdm(total=len(items), initial=done, unit="image", disable=None) as progress:
        for batch in loader:
            for name, content, fault in batch:
                if name in archive.NameToInfo:
                    raise DataError(f"two images would have the name {name}: leave one out")
                if fault:
                    bad += 1
                    say(f"stored as it is: {fault}")
                archive.writestr(zipfile.ZipInfo(name, _DATE), content)
            progress.update(len(batch))
    return bad


class _Split(Dataset[Any]):
    """The images of a split: name, content and fault of each."""

    def __init__(self, split: str, listing: Listing, root: Path, packing: Packing) -> None:
        self.split, self.listing, self.packing = split, listing, packing
        self.root = root.expanduser()

    def __len__(self) -> int:
        return len(self.listing.files)

    def source(self, index: int) -> str:
        """What names an image in messages."""
        listing = self.listing
        return str(listing.files[index] if listing.names is None else listing.names[index])

    def name(self, index: int) -> str:
        """Its name in the packed set, but for an ending that its format adds."""
        listing, name = self.listing, self.source(index)
        for folder in (self.root / self.split, self.root):
            if name.startswith(f"{folder}{os.sep}"):
                name = os.path.relpath(name, folder)
                break
        else:  # a row of a table
            name = f"{index:08d}"
            if np.ndim(listing.labels[index]) == 0:
                name = f"{listing.classes[int(listing.labels[index])]}/{name}"
        # ZIP files have names in UTF-8.
        name = os.fsencode(Path(name).as_posix()).decode("utf-8", "backslashreplace")
        return f"{self.split}/{name}"

    def __getitem__(self, index: int) -> tuple[str, bytes, str]:
        name, kind = self.name(index), self.packing.format
        try:
            stored = self.listing.files[index]
        except BadImageError as error:  # of an archive that is damaged
            return name, b"", str(error)
        if kind == "keep":
            is_named = not isinstance(stored, np.ndarray) or name.endswith(".npy")
            return name if is_named else f"{name}.npy", *_content(stored, self.source(index))
        try:
            image = read_image(stored, upright=self.packing.upright, name=self.source(index))
        except BadImageError as error:
            return name, _content(stored, "")[0], str(error)
        side = self.packing.side
        if side is not None and min(image.size) > side:
            scale = side / min(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        if kind == "raw":
            np.save(stream, np.asarray(image), allow_pickle=False)
            return f"{name}.npy", stream.getvalue(), ""
        if max(image.size) > _LONGEST:
            fault = f"{self.source(index)}: JPEG files have {_LONGEST} pixels a side at most"
            return name, _content(stored, "")[0], fault
        image.save(stream, "JPEG", quality=self.packing.quality)
        is_jpeg = name.lower().endswith((".jpg", ".jpeg"))
        return name if is_jpeg else f"{name}.jpg", stream.getvalue(), ""


def _content(stored: Stored, name: str) -> tuple[bytes, str]:
    """An image's bytes as they are stored, and what is wrong with them."""
    if isinstance(stored, np.ndarray):
        if stored.dtype != np.uint8 or stored.shape[2:] != (3,):
            raise DataError(
                f"{name}: {stored.dtype} {list(stored.shape)}: expected an array, uint8 [H, W, 3]"
            )
        stream = io.BytesIO()
        np.save(stream, stored, allow_pickle=False)
        return stream.getvalue(), ""
    if not isinstance(stored, Path):
        return bytes(stored), ""
    try:
        return stored.read_bytes(), ""
    except OSError as error:
        return b"", f"cannot read image {name or stored}: {error.strerror or error}"


def _write_index(archive: zipfile.ZipFile, file: IO[bytes], splits: Sequence[_Split]) -> None:
    infos = iter(archive.infolist()[1:])
    classes = {each.split: list(each.listing.classes) for each in splits}
    arrays: dict[str, Any] = {"meta": json.dumps({"splits": classes})}
    for each in splits:
        split, members = each.split, list(islice(infos, len(each)))
        names = Names.of(info.filename for info in members)
        # A name without ASCII is longer in UTF-8; members have no extra fields.
        starts = [
            info.header_offset + _HEADER.size + len(info.filename.encode()) for info in members
        ]
        arrays[f"{split}/text"], arrays[f"{split}/ends"] = names.text, names.ends
        arrays[f"{split}/starts"] = np.array(starts, dtype=np.int64)
        arrays[f"{split}/sizes"] = np.array([i.file_size for i in members], dtype=np.int64)
        arrays[f"{split}/crcs"] = np.array([i.CRC for i in members], dtype=np.uint32)
        arrays[f"{split}/labels"] = np.asarray(each.listing.labels)
        if each.packing.format == "raw" or any(i.filename.endswith(".npy") for i in members):
            shapes = [
                _shape(file, at) if info.filename.endswith(".npy") else (0, 0)
                for info, at in zip(members, starts, strict=True)
            ]
            arrays[f"{split}/shapes"] = np.array(shapes, dtype=np.int32)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    file.seek(0, os.SEEK_END)
    content = stream.getvalue()
    start = file.tell() + _HEADER.size + len(_INDEX_NAME)
    archive.writestr(zipfile.ZipInfo(_INDEX_NAME, _DATE), content)
    archive.comment = b"kw-pack 1 %d %d %d" % (start, len(content), zlib.crc32(content))
    assert INDEX.fullmatch(archive.comment)


def _shape(file: IO[bytes], start: int) -> tuple[int, int]:
    """Height and width of pixels in a NumPy file."""
    file.seek(start)
    np.lib.format.read_magic(file)
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return int(shape[0]), int(shape[1])


def _whole_members(file: IO[bytes]) -> tuple[list[zipfile.ZipInfo], int]:
    """The members that an interrupted run has written, and where they end; without the very last
    one, which may be cut. ZIP files list their members at the end, which is not written yet."""
    end = file.seek(0, os.SEEK_END)
    found: list[zipfile.ZipInfo] = []
    at = 0
    while at + _HEADER.size <= end:
        file.seek(at)
        fields = _HEADER.unpack(file.read(_HEADER.size))
        signature, _, flags, *_, crc, size, full, length, extra = fields
        begin = at + _HEADER.size + length + extra
        if signature != b"PK\x03\x04" or size != full or begin + size > end:
            break
        name = file.read(length).decode("utf-8" if flags & 0x800 else "cp437")
        info = zipfile.ZipInfo(name, _DATE)
        info.header_offset, info.CRC = at, crc
        info.file_size = info.compress_size = size
        info.flag_bits, info.external_attr = flags, 0o600 << 16  # as zipfile writes them
        found.append(info)
        at = begin + size
    if len(found) < 2:
        return [], 0
    return found[:-1], found[-1].header_offset


def check_packed(file: Path) -> str | None:
    """The first member whose checksum is another one; ``None`` where all are right. What is no ZIP
    file raises a DataError."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: {error}") from error
