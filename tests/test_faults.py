"""Images that are damaged or unusual: what is read, what stands in, what is told, what stops."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, TiffImagePlugin
from processes import in_processes

from kw.config import config_from_mapping
from kw.config.data_schema import DataConfig
from kw.config.run_schema import BadImagesConfig
from kw.data import (
    UNREADABLE,
    BadImage,
    BadImageError,
    DataError,
    EvalBatchSampler,
    FaultLog,
    ImageFolder,
    TrainBatchSampler,
    build_loader,
    build_transform,
    deaths_explained,
    read_image,
)
from kw.data.reading import read_header
from kw.training import build_trainer, evaluate_checkpoint, load_checkpoint, train
from kw.training.distributed import Process
from kw.training.run import evaluate_weights

CPU = Process(0, 1, torch.device("cpu"))
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# --- what is read ----------------------------------------------------------------------------


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


READABLE: dict[str, tuple[Callable[[], Image.Image], str, dict[str, Any], list[Any]]] = {
    "cmyk": (lambda: Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "jpg", {"quality": 100}, [RED]),
    "cmyk-tiff": (lambda: Image.new("CMYK", (1, 1), (255, 255, 0, 0)), "tif", {}, [BLUE]),
    "grey": (lambda: Image.new("L", (1, 1), 77), "png", {}, [(77,) * 3]),
    "bilevel": (lambda: Image.new("1", (1, 1), 1), "png", {}, [WHITE]),
    "grey-alpha": (lambda: Image.new("LA", (1, 1), (77, 9)), "png", {}, [(77,) * 3]),
    "alpha": (lambda: Image.new("RGBA", (1, 1), (1, 2, 3, 0)), "png", {}, [(1, 2, 3)]),
    "palette": (palette, "png", {}, [RED, BLUE]),
    "palette-transparent": (palette, "png", {"transparency": 1}, [RED, BLUE]),
    "palette-alphas": (palette, "png", {"transparency": b"\x00\x80"}, [RED, BLUE]),
    "gif": (palette, "gif", {}, [RED, BLUE]),
    **{
        f"16-bit-{kind}": (sixteen_bits, kind, {}, [(0,) * 3, (100,) * 3, WHITE])
        for kind in ("png", "tif", "ppm")
    },
}


@pytest.mark.parametrize("name", READABLE)
def test_every_way_of_storing_pixels(name: str, tmp_path: Path) -> None:
    make, kind, options, expected = READABLE[name]
    # By its content, whatever it is called.
    path = saved(make(), tmp_path / f"image.{kind}", **options).rename(tmp_path / "image.bmp")
    image = read_image(path)
    assert image.mode == "RGB"
    found = np.asarray(image).reshape(-1, 3)
    assert np.abs(found.astype(int) - np.array(expected)).max() <= (1 if kind == "jpg" else 0)


def png(bit_depth: int, colour: int, size: tuple[int, int], rows: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", *size, bit_depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bits_of_colour(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(16, 2, (1, 1), struct.pack(">BHHH", 0, 65535, 100 * 257, 0)))
    assert read_image(path).getpixel((0, 0)) == (255, 100, 0)


def test_twelve_bits_of_grey() -> None:
    """White is 4095, in the 16 bits that Pillow gives."""
    pixels = int("".join(f"{level:012b}" for level in (0, 1000, 2048, 4095)), 2).to_bytes(6, "big")
    # Width, height, bits, no compression, black is 0, where they begin, channels, rows, bytes.
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags.items())
    tiff = struct.pack("<2sHI", b"II", 42, 14) + pixels + struct.pack("<H", 9) + entries + bytes(4)
    assert np.asarray(read_image(tiff))[0, :, 0].tolist() == [0, 62, 128, 255]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_as_they_are_meant(compression: Any, tmp_path: Path) -> None:
    """16 bits of which 0 is white, which Pillow does not turn around (Pillow's pull request 6642);
    colours in planes, of which it reads the wrong bytes."""
    write = partial(pytest.importorskip("tifffile").imwrite, compression=compression)
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    grey = np.rint((65535 - values[..., :1].astype(float)) / 257).astype(np.uint8)
    write(tmp_path / "white.tif", values[..., 0], photometric="miniswhite")
    assert (np.asarray(read_image(tmp_path / "white.tif")) == grey).all()
    planes, mixed = tmp_path / "planes.tif", tmp_path / "mixed.tif"
    write(planes, values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    write(mixed, values, photometric="rgb")
    if compression is None:
        for read in (read_image, read_header):
            with pytest.raises(BadImageError, match="16 bits in planes, not compressed, which"):
                read(planes)
    else:
        assert read_image(planes) == read_image(mixed)
    palette = np.arange(768, dtype=np.uint16).reshape(3, 256) % 256  # of 8 bits: black to Pillow
    write(tmp_path / "eight.tif", grey[..., 0], photometric="palette", colormap=palette)
    with pytest.raises(BadImageError, match="a palette of 8 bits, not 16, which Pillow misreads"):
        read_image(tmp_path / "eight.tif")
    if all(mode != "La" for mode, _ in TiffImagePlugin.OPEN_INFO.values()):
        return  # an earlier version of Pillow, to which this is no image
    write(tmp_path / "alpha.tif", np.uint8([[[50, 128]]]), extrasamples=["assocalpha"])
    assert read_image(tmp_path / "alpha.tif").getpixel((0, 0)) == (99,) * 3  # 50 * 255 / 128


@pytest.mark.parametrize("width", [40, 3])  # rows of 3 take 4 bytes, of eight bits or one
@pytest.mark.parametrize("colours", [[0, 255], [255, 0], [0, 128]])
def test_bmps_of_two_greys(colours: list[int], width: int, tmp_path: Path) -> None:
    """Pillow takes eight bits a pixel for one where these are black and white, in this order."""
    indices = np.random.default_rng(0).integers(0, 2, (9, width), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([level for level in colours for _ in "rgb"])
    path = saved(image, tmp_path / "image.bmp")
    if colours == [0, 255]:
        with pytest.raises(
            BadImageError, match=r"black and white of several bits|unknown raw mode"
        ):
            read_image(path)
        path = saved(image.convert("1"), path)  # one bit
    assert (np.asarray(read_image(path))[..., 0] == np.array(colours)[indices]).all()
    if colours == [0, 255] and PIL.__version__ < "13":
        return  # earlier versions do not read these compressed
    whole = saved(image, path).read_bytes()
    runs = [b"".join(bytes([1, index]) for index in row) + b"\0\0" for row in indices[::-1]]
    start = int.from_bytes(whole[10:14], "little")
    path.write_bytes(whole[:30] + b"\1" + whole[31:start] + b"".join(runs) + b"\0\1")
    assert (np.asarray(read_image(path))[..., 0] == np.array(colours)[indices]).all()


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (32, 16), BLUE)
    upright.paste(RED, (0, 0, 16, 8))
    turn = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # how a camera held so stores it
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / f"image.{kind}", exif=exif)
    found = read_image(path)
    assert found.size == upright.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 12
    if kind != "tif":  # Pillow turns those whatever is asked for
        assert read_image(path, upright=False).size == stored.size


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mark", ["exif", "xmp", "late"])
def test_header_and_reader_agree_on_the_orientation(kind: str, mark: str, tmp_path: Path) -> None:
    """EXIF data count, also behind a PNG's pixels; XMP does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    more: dict[str, Any] = {"exif": exif} if mark == "exif" else {"xmp": xmp}
    if mark == "late":
        more = {"exif": exif}
    path = saved(Image.new("RGB", (32, 16), BLUE), tmp_path / f"image.{kind}", **more)
    if mark == "late":
        if kind != "png":
            pytest.skip("a PNG's matter")
        content = path.read_bytes()
        at = content.index(b"eXIf") - 4
        size = int.from_bytes(content[at : at + 4], "big") + 12
        chunk, end = content[at : at + size], len(content) - 12
        path.write_bytes(content[:at] + content[at + size : end] + chunk + content[end:])
    header = read_header(path)
    assert read_image(path).size == header.upright_size
    assert header.orientation == (1 if mark == "xmp" else 6)
    with Image.open(path) as opened:
        assert read_image(opened).size == header.upright_size


# --- what is not -----------------------------------------------------------------------------


def break_image(path: Path, fault: str) -> None:
    """Put a fault in place of a file."""
    path.unlink()
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    if fault == "empty":
        path.touch()
    elif fault == "text":
        path.write_text("<html>404 Not Found</html>")
    elif fault == "truncated":
        noise.save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue()[:2000])
    elif fault == "truncated-png":
        noise.save(buffer, "PNG")
        path.write_bytes(buffer.getvalue()[:2000])
    elif fault == "header":
        noise.save(buffer, "PNG")
        path.write_bytes(buffer.getvalue()[:20])
    elif fault == "bomb":
        path.write_bytes(png(8, 2, (60000, 60000), bytes(1000)))
    elif fault == "large":
        path.write_bytes(png(8, 2, (10000, 10000), bytes(1000)))
    elif fault == "float":
        Image.new("F", (4, 4)).save(path, "TIFF")
    else:
        assert fault == "missing"


REASONS = {
    "missing": "No such file",
    "empty": "the file is empty",
    "text": "no image of a known format",
    "truncated": "truncated",
    "truncated-png": "truncated",
    "header": r"\w",
    "bomb": "decompression bomb",
    "large": "10000 x 10000 pixels, more than 1000000",
    "float": "nothing says what is white",
}


@pytest.mark.parametrize("fault", REASONS)
def test_unreadable_files_are_told_from_one_another(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.touch()
    break_image(path, fault)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImageError, match=REASONS[fault]) as caught:
        read_image(path, max_pixels=1_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.path) == (str(caught.value), str(path))


@pytest.mark.parametrize(
    ("number", "text", "error"),
    [(13, "Permission denied", BadImageError), (5, "Input/output error", BadImageError),
     (24, "Too many open files", OSError), (12, "Cannot allocate memory", OSError)],
)  # fmt: skip
def test_the_machines_troubles_are_not_the_files(
    number: int, text: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, text)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises((OSError, BadImageError), match=text) as caught:
        read_image(tmp_path / "image.png")
    assert caught.type is error


# --- what stands in --------------------------------------------------------------------------


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """The tests' data set with four bad training files of 64 and one bad test file of 19."""
    root = tmp_path / "broken"
    for source in images.rglob("*.png"):
        target = root / source.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for name, fault in zip(
        ("bird/0", "cat/11", "dog/4", "fish/15"),
        ("empty", "truncated", "bomb", "text"),
        strict=True,
    ):
        break_image(root / "train" / f"{name}.png", fault)
    break_image(root / "val" / "cat" / "2.png", "empty")
    return root


def folder(root: Path, split: str = "train", **settings: Any) -> ImageFolder:
    config = DataConfig(root="unused", input_size=16, auto_augment="rand-m9-mstd0.5-inc1")
    settings = {"max_fraction": 0.1, **settings}
    training = split == "train"
    transform = build_transform(config, training)
    return ImageFolder(root, split, transform, 3, training, BadImagesConfig(**settings))


def batches(root: Path, workers: int, ranks: int = 1) -> tuple[list[dict[str, Any]], set[str]]:
    """Two epochs' micro-batches of 8, and the files that were met."""
    found, met = [], set()
    for rank in range(ranks):
        dataset = folder(root)
        sampler = TrainBatchSampler(len(dataset), 8, 16, rank, ranks, dataset.seed)
        loader = build_loader(dataset, sampler, workers)
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            found += list(loader)
        met |= {Path(fault.path).name for fault in loader.faults.take()}
    return found, met


def test_substitutes_do_not_depend_on_workers_or_ranks(broken: Path) -> None:
    alone, met = batches(broken, 0)
    assert met == {"0.png", "11.png", "4.png", "15.png"}
    by_key = {batch["key"]: batch for batch in alone}
    for found, also_met in (batches(broken, 2), batches(broken, 0, ranks=2)):
        assert also_met == met
        assert len(found) == len(alone) == 16
        for batch in found:
            assert "faults" not in batch
            for name in ("images", "labels", "indices"):
                assert torch.equal(batch[name], by_key[batch["key"]][name])
    assert all(batch["images"].shape == (8, 3, 16, 16) for batch in alone)
    # Another epoch, another substitute.
    dataset = folder(broken)
    samples = [dataset[epoch, 0] for epoch in range(6)]
    assert len({sample.sample.label for sample in samples}) > 1
    assert all(sample.sample.key == (epoch, 0) for epoch, sample in enumerate(samples))
    assert {fault.image for sample in samples for fault in sample.faults} >= {0}


def test_good_images_do_not_change(images: Path, broken: Path) -> None:
    assert torch.equal(folder(images)[1, 5].image, folder(broken)[1, 5].image)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_policy_raise(broken: Path, workers: int) -> None:
    dataset = folder(broken, "val", policy="raise")
    loader = build_loader(dataset, EvalBatchSampler(len(dataset), 4), workers)
    with pytest.raises(DataError, match=r"cannot read image \S*cat/2.png: the file is empty$"):
        list(loader)


def test_a_disk_that_is_gone_stops_at_once(images: Path) -> None:
    dataset = folder(images)
    dataset.files.folder = Path("/nowhere")
    with pytest.raises(DataError, match="none of 16 images drawn one after another is readable"):
        dataset[0, 0]


def test_the_bound(tmp_path: Path) -> None:
    assert FaultLog(64, BadImagesConfig()).allowed == 1
    assert FaultLog(64, BadImagesConfig(max_fraction=0)).allowed == 0
    log = FaultLog(2000, BadImagesConfig(max_fraction=0.001))
    assert log.allowed == 2
    faults = [BadImage(n, str(tmp_path / f"{n}.png"), "why") for n in (7, 3, 7, 5)]
    for fault in faults:
        Path(fault.path).touch()
    log.record(faults[:1])
    assert log.merge(log.take()) == faults[:1]
    log.record(faults[:2])
    assert log.merge(log.take()) == faults[1:2]
    log.check()
    state = json.loads(json.dumps(log.state_dict()))
    restored = FaultLog(2000, BadImagesConfig(max_fraction=0.001))
    restored.load_state_dict(state)
    assert restored.merge(faults) == faults[3:]
    with pytest.raises(DataError, match=r"3 of 2000 images.*the 2 that") as error:
        restored.check()
    assert all(f"{n}.png: why" in str(error.value) for n in (3, 5, 7))
    # Repaired, and removed.
    saved(Image.new("RGB", (1, 1)), tmp_path / "3.png")
    (tmp_path / "7.png").unlink()
    restored.load_state_dict(state)
    assert not restored.known


# --- a run -----------------------------------------------------------------------------------


def with_data(settings: dict[str, Any], root: Path, **data: Any) -> Any:
    settings["data"].update(root=str(root), **data)
    return config_from_mapping(settings)


def lines_of(work_dir: Path, mode: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["mode"] == mode]


def test_a_run_goes_on_and_tells(settings: dict[str, Any], broken: Path, tmp_path: Path) -> None:
    settings["ema"] = {"decay": 0.5}
    config = with_data(settings, broken, workers=1, bad_images={"max_fraction": 0.1})
    work_dir = tmp_path / "run"
    metrics = train(config, work_dir)
    listed = (work_dir / "bad_images.txt").read_text().splitlines()
    names = ["/".join(Path(line.split("\t")[1]).parts[-3:]) for line in listed]
    assert sorted(names) == [
        "train/bird/0.png", "train/cat/11.png", "train/dog/4.png", "train/fish/15.png",
        "val/cat/2.png",
    ]  # fmt: skip
    # Once each, though two epochs met them and two networks were evaluated.
    assert len(lines_of(work_dir, "bad_image")) == 5
    (text,) = work_dir.glob("*/*.log")
    assert (
        text.read_text().count("bird/0.png: the file is empty; another image takes its place") == 1
    )
    # In evaluation it stays an image: wrong, and without a loss.
    assert metrics["images"] == 19
    assert metrics["unreadable_images"] == 1
    checkpoint = load_checkpoint(work_dir / "last.pth")
    assert len(checkpoint["bad_images"]["train"]["known"]) == 4
    with pytest.warns(UserWarning, match=r"cat/2.png: the file is empty; it counts as wrong"):
        again = evaluate_checkpoint(config, work_dir / "last.pth")
    assert again["top1"] == metrics["ema_top1"]
    assert again["unreadable_images"] == 1
    sound = tmp_path / "sound"  # calibration is of the images that can be read
    shutil.copytree(broken, sound)
    (sound / "val/cat/2.png").unlink()
    without = evaluate_checkpoint(with_data(settings, sound), work_dir / "last.pth")
    assert again["ece"] == pytest.approx(without["ece"])
    assert (again["images"], without["images"]) == (19, 18)
    config = with_data(settings, broken)
    resumed = build_trainer(config, work_dir, Process(0, 1, torch.device("cpu")), resume=True)
    resumed.load()
    assert len(resumed.train_loader.faults.known) == 4
    assert len(resumed.val_loader.faults.known) == 1
    config.data.bad_images.policy = "raise"
    with pytest.raises(DataError, match=r"val/cat/2.png"):
        evaluate_checkpoint(config, work_dir / "last.pth")


def test_a_run_stops_beyond_the_bound(
    settings: dict[str, Any], broken: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"\d of 64 images cannot be read, more than the 1 that"):
        train(with_data(settings, broken), tmp_path / "run")
    assert (tmp_path / "run" / "bad_images.txt").exists()


def test_the_bound_is_on_all_processes_together(broken: Path) -> None:
    """One bad file in each process's share, of which the set may have one."""
    (broken / "val/bird/0.png").write_bytes(b"")
    (broken / "val/bird/1.png").write_bytes(b"")
    (broken / "val/cat/2.png").write_bytes((broken / "val/cat/1.png").read_bytes())

    def share(process: Process) -> None:
        images = folder(broken, "val", max_fraction=0.05)
        loader = build_loader(images, EvalBatchSampler(len(images), 4, process.rank, 2), 0)
        network = torch.nn.Linear(1, 1)

        def measure() -> dict[str, float]:
            return {"images": sum(len(batch["labels"]) for batch in loader)}

        state = {"state_dict": network.state_dict()}
        with pytest.raises(DataError, match="2 of 19 images cannot be read, more than the 1 that"):
            evaluate_weights(network, state, "a.pth", loader, measure)

    in_processes(share, 2)


def test_a_bad_test_image_is_wrong(images: Path, broken: Path) -> None:
    dataset = folder(broken, "val")
    index = next(i for i in range(len(dataset)) if dataset.path(i).parts[-2:] == ("cat", "2.png"))
    sampler = EvalBatchSampler(len(dataset), 19)
    (batch,) = build_loader(dataset, sampler, workers=0)
    (good,) = build_loader(folder(images, "val"), sampler, workers=0)
    assert batch["labels"][index] == UNREADABLE
    assert (batch["labels"] != good["labels"]).sum() == 1
    assert torch.equal(batch["images"][:index], good["images"][:index])
    assert torch.equal(batch["images"][index + 1 :], good["images"][index + 1 :])


class Deadly:
    """A transform that its process does not survive for images of one colour."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.getpixel((0, 0)) == RED:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


def test_a_dead_process_is_reported_with_its_image(images: Path, tmp_path: Path) -> None:
    for label in ("ant", "bee"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(8):
            colour = RED if (label, number) == ("bee", 5) else BLUE
            saved(Image.new("RGB", (8, 8), colour), tmp_path / "train" / label / f"{number}.png")
    dataset = ImageFolder(tmp_path, "train", Deadly(), training=True)
    loader = build_loader(dataset, TrainBatchSampler(len(dataset), 4, 4), workers=2)
    with (
        pytest.raises(DataError, match=r"killed by SIGKILL.*read image 13, \S*bee/5.png"),
        deaths_explained(loader),
    ):
        list(loader)
    with pytest.raises(RuntimeError, match="another"), deaths_explained():
        raise RuntimeError("another")


def test_a_death_is_told_once() -> None:
    """torch's handler raises again when the process is gone while its death is looked into."""

    class Gone(SimpleNamespace):
        def join(self, timeout: float) -> None:
            os.kill(os.getpid(), signal.SIGCHLD)

    def handler(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        loader: Any = SimpleNamespace(
            _iterator=SimpleNamespace(_workers=[Gone(exitcode=-9, pid=7)]),
            dataset=SimpleNamespace(in_hand=lambda worker: None),
        )
        with (
            pytest.raises(DataError, match=r"pid 7\) was killed by SIGKILL"),
            deaths_explained(loader),
        ):
            raise EOFError
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_death_during_a_run(settings: dict[str, Any], images: Path, tmp_path: Path) -> None:
    """torch raises from a signal handler: anywhere in the run."""
    trainer = build_trainer(with_data(settings, images, workers=2), tmp_path, CPU)
    dataset: Any = trainer.train_loader.dataset
    read = dataset.read

    def deadly(index: int, key: tuple[int, int], **where: Any) -> Any:
        if index == 20 and key[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(index, key, **where)

    dataset.read = deadly
    with pytest.raises(DataError, match=r"killed by SIGKILL.*read image 20, \S*train/cat/12.png"):
        trainer.run()


def test_a_set_of_which_nothing_can_be_read(
    settings: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    """An evaluation names the files, as one that met some of them does."""
    run = with_data(settings, images, workers=0)
    train(replace(run, epochs=1, temperature_epochs=0), tmp_path / "run")
    root = tmp_path / "set"
    shutil.copytree(images, root)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    broken = replace(run, data=replace(run.data, root=str(root)))
    with pytest.raises(DataError, match=r"19 of 19 images cannot be read, more than the 1"):
        evaluate_checkpoint(broken, tmp_path / "run/last.pth")
    with pytest.raises(DataError, match=r"19 of 19 images cannot be read, more than the 1"):
        train(replace(broken, epochs=1, temperature_epochs=0), tmp_path / "again")
