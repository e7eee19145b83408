#!/usr/bin/env python
"""Compare libraries that decode JPEG files: images a second of one core, size, difference.

python scripts/compare_decoders.py FOLDER           # all *.jpg and *.jpeg below it

Those that are installed take part: pip install pillow simplejpeg opencv-python-headless imagecodecs
pyvips-binary pyvips nvidia-nvimgcodec-cu13 nvidia-dali-cuda130. Of each image a random part becomes
224 pixels square by a bicubic filter with antialiasing, where the library has one. Libraries take
turns in one process; figures are of processor time, medians of the rounds. The difference is the
largest between whole pictures and Pillow's, in levels of 255.
"""

import importlib.metadata
import io
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kw.cli import ToolParser, number, run_tool
from kw.data.fast import Box, draw_box
from kw.evaluation import render_table
from kw.torch_private import resize_bytes

SIZE = 224
Decode = Callable[[bytes], np.ndarray]
Cut = Callable[[bytes, Box], Any]


def with_torch(decode: Decode) -> Cut:
    out = torch.empty(SIZE * SIZE * 3, dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)

    def cut(data: bytes, box: Box) -> None:
        top, left, rows, columns = box
        part = decode(data)[top : top + rows, left : left + columns]
        resize_bytes(torch.from_numpy(part).permute(2, 0, 1), "bicubic", out)

    return cut


def by_pillow() -> tuple[Decode, Cut]:
    def decode(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def cut(data: bytes, box: Box) -> None:
        top, left, rows, columns = box
        image = Image.open(io.BytesIO(data)).convert("RGB")
        part = (left, top, left + columns, top + rows)
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, part)

    return decode, cut


def by_simplejpeg() -> tuple[Decode, Cut]:
    import simplejpeg

    return simplejpeg.decode_jpeg, with_torch(simplejpeg.decode_jpeg)


def by_torchvision() -> tuple[Decode, Cut]:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> np.ndarray:
        found = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return found.permute(1, 2, 0).numpy()

    return decode, with_torch(decode)


def by_opencv() -> tuple[Decode, Cut]:
    import cv2

    cv2.setNumThreads(1)

    def decode(data: bytes) -> np.ndarray:
        array = np.frombuffer(data, np.uint8)
        return np.asarray(cv2.imdecode(array, cv2.IMREAD_COLOR_RGB))

    def cut(data: bytes, box: Box) -> None:  # its bicubic filter has no antialiasing
        top, left, rows, columns = box
        part = decode(data)[top : top + rows, left : left + columns]
        cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)

    return decode, cut


def by_imagecodecs() -> tuple[Decode, Cut]:
    import imagecodecs

    def decode(data: bytes) -> np.ndarray:
        found = np.asarray(imagecodecs.jpeg8_decode(data))
        return found if found.ndim == 3 else np.repeat(found[..., None], 3, 2)

    return decode, with_torch(decode)


def by_pyvips() -> tuple[Decode, Cut]:
    import pyvips

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(pyvips.Image.new_from_buffer(data, "").colourspace("srgb").numpy())

    def cut(data: bytes, box: Box) -> None:
        top, left, rows, columns = box
        image = pyvips.Image.new_from_buffer(data, "").colourspace("srgb")
        part = image.crop(left, top, columns, rows)
        part.resize(SIZE / columns, vscale=SIZE / rows, kernel="cubic").numpy()

    return decode, cut


def by_nvimgcodec() -> tuple[Decode, Cut]:
    from nvidia import nvimgcodec

    backend = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    cpu = -99999  # its header's NVIMGCODEC_DEVICE_CPU_ONLY
    decoder = nvimgcodec.Decoder(device_id=cpu, backends=[backend], max_num_cpu_threads=1)
    out = torch.empty(SIZE * SIZE * 3, dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(decoder.decode(nvimgcodec.CodeStream(data)).cpu())

    def cut(data: bytes, box: Box) -> None:  # it decodes nothing but the part
        top, left, rows, columns = box
        region = nvimgcodec.Region(top, left, top + rows, left + columns)
        stream = nvimgcodec.CodeStream(data).get_sub_code_stream(region=region)
        part = torch.from_numpy(np.asarray(decoder.decode(stream).cpu()))
        resize_bytes(part.permute(2, 0, 1), "bicubic", out)

    return decode, cut


def by_dali() -> tuple[Decode, Cut]:
    from nvidia.dali import fn, pipeline_def, types

    given: dict[str, Any] = {}

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipe(whole: bool) -> Any:
        data, start, shape = fn.external_source(
            source=lambda: ([given["data"]], [given["start"]], [given["shape"]]), num_outputs=3
        )
        if whole:
            return fn.decoders.image(data, device="cpu")
        part = fn.decoders.image_slice(data, start=start, shape=shape, axes=[0, 1], device="cpu")
        kind = types.INTERP_CUBIC
        return fn.resize(part, size=(SIZE, SIZE), interp_type=kind, antialias=True)

    pipes = {whole: pipe(whole) for whole in (True, False)}
    for each in pipes.values():
        each.build()

    def run(data: bytes, box: Box, whole: bool) -> np.ndarray:
        given["data"] = np.frombuffer(data, np.uint8)
        given["start"], given["shape"] = (np.array(n, np.int32) for n in (box[:2], box[2:]))
        return np.asarray(pipes[whole].run()[0].at(0))

    return lambda data: run(data, (0, 0, 1, 1), True), lambda data, box: run(data, box, False)


LIBRARIES: dict[str, tuple[str, Callable[[], tuple[Decode, Cut]]]] = {
    "Pillow": ("pillow", by_pillow),
    "simplejpeg, torch": ("simplejpeg", by_simplejpeg),
    "torchvision, torch": ("torchvision", by_torchvision),
    "OpenCV": ("opencv-python-headless", by_opencv),
    "imagecodecs, torch": ("imagecodecs", by_imagecodecs),
    "pyvips": ("pyvips-binary", by_pyvips),
    "nvImageCodec, torch": ("nvidia-nvimgcodec-cu13", by_nvimgcodec),
    "DALI": ("nvidia-dali-cuda130", by_dali),
}


def about(package: str) -> tuple[str, str]:
    """A package's version, and MiB of its files."""
    found = importlib.metadata.distribution(package)
    paths = [Path(str(found.locate_file(file))) for file in found.files or ()]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return found.version, f"{size / 2**20:.0f}"


def measure(function: Callable[[int], Any], count: int) -> float:
    begin = time.process_time()
    for i in range(count):
        function(i)
    return count / (time.process_time() - begin)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=number(int, 1, 100), default=5)
    parser.add_argument("--images", type=number(int, 1, 10**6), default=100, help="of a round")
    args = parser.parse_args()
    files = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        parser.error(f"{args.folder}: no *.jpg and no *.jpeg in it")
    torch.set_num_threads(1)
    content = [path.read_bytes() for path in files]
    sizes = [Image.open(path).size for path in files]
    draw = random.Random(0)
    boxes = [
        draw_box(sizes[i % len(files)], (0.08, 1), (0.75, 4 / 3), draw) for i in range(args.images)
    ]
    exact = [by_pillow()[0](data) for data in content]
    tried: dict[str, tuple[Decode, Cut]] = {}
    for name, (package, build) in LIBRARIES.items():
        try:
            importlib.metadata.distribution(package)
            tried[name] = build()
        except ImportError as error:
            print(f"not installed: {name} ({error})")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in tried}
    for round_ in range(args.rounds + 1):
        for name, (decode, cut) in tried.items():
            found = (
                measure(lambda i, f=decode: f(content[i % len(files)]), args.images),
                measure(lambda i, f=cut: f(content[i % len(files)], boxes[i]), args.images),
            )
            if round_:  # the first warms up
                rates[name].append(found)
    rows = []
    for name, (decode, _) in tried.items():
        away = [
            int(np.abs(decode(data).astype(int) - right).max())
            for data, right in zip(content, exact, strict=True)
        ]
        whole, cropped = (statistics.median(each) for each in zip(*rates[name], strict=True))
        version, size = about(LIBRARIES[name][0])
        rows.append((name, version, size, f"{whole:,.0f}", f"{cropped:,.0f}", str(max(away))))
    head = ("library", "version", "MiB", "decoded/s", "cut to 224/s", "difference")
    print(render_table(head, rows, left=(0, 1)))


if __name__ == "__main__":
    run_tool(main)
