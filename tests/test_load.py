"""``kw.load``: a ready classifier from every kind of file, and answers to other files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployment import CLASSES, SETTINGS, write_checkpoint
from PIL import Image

import kw
from kw.config import ConfigError, to_yaml
from kw.config.data_schema import DataConfig
from kw.data import BatchPreprocessor, ImageFolder, build_transform
from kw.deploy import ExportError, export, read_source
from kw.deploy.classifier import Classifier
from kw.deploy.description import InputRange
from kw.deploy.export import Options
from kw.deploy.source import figures_of, without_places
from kw.errors import UserError
from kw.training import load_trained
from kw.training.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory, with a safetensors file beside its checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder / "best.pth", SETTINGS)
    export(read_source(folder), folder / "tiny.safetensors", Options())
    return folder


def test_ready_for_use(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (weights,) = run.glob("*.safetensors")
    state = load_checkpoint(run / "best.pth")["ema_state_dict"]
    images = torch.randn(2, 3, 40, 40)
    found = []
    for path in (run, run / "best.pth", weights):
        classifier = kw.load(path)
        told = "temperature 0.5, before annealing had ended; at 0 it is not what was evaluated"
        assert capsys.readouterr().err.count(told) == (path != weights)
        assert classifier.classes == CLASSES
        assert not any(module.training for module in classifier.modules())
        assert kw.get_temperature(classifier.network) == 0
        assert torch.equal(classifier.network.state_dict()["fc.weight"], state["fc.weight"])
        found.append(classifier(images))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    own = kw.load(run, weights="model").network.state_dict()["fc.weight"]
    assert not torch.equal(own, state["fc.weight"])


def test_settings_are_of_a_file(run: Path) -> None:
    """Of a checkpoint's own configuration, or one that is there already, they would be lost."""
    own = load_trained(run).config
    for config in (None, own):
        with pytest.raises(ConfigError, match=r"options data\.root=new: expected the file"):
            load_trained(run, config, ["data.root=new"])
    (run / "config.yaml").write_text(to_yaml(own))
    assert load_trained(run, run / "config.yaml", ["data.root=new"]).config.data.root == "new"


def test_images_are_prepared_as_in_evaluation(run: Path, images: Path) -> None:
    """The whole way from a file to logits, by evaluation's dataset and by ``predict``."""
    classifier = kw.load(run)
    data = DataConfig(root=str(images), input_size=40, interpolation="bilinear")
    dataset = ImageFolder(images, "val", build_transform(data, False))
    samples = [dataset[(0, index)] for index in range(len(dataset))]
    batch = {"images": torch.stack([s.image for s in samples]), "labels": torch.zeros(19).long()}
    prepared, _ = BatchPreprocessor(data, 4)(batch, training=False)
    with torch.no_grad():
        expected = classifier.network(prepared).softmax(1)
    files = [dataset.path(index) for index in range(len(dataset))]
    found = classifier.predict(files, k=2, batch_size=8)
    assert [len(row) for row in found] == [2] * 19
    for row, shares in zip(found, expected, strict=True):
        best = shares.argsort(descending=True)[:2].tolist()
        assert [p.label for p in row] == best
        assert [p.name for p in row] == [CLASSES[label] for label in best]
        assert [p.probability for p in row] == pytest.approx(shares[best].tolist(), abs=1e-4)


def oddities() -> dict[str, Image.Image]:
    """What must be read alike from a file and from what Pillow makes of it."""
    draw = np.random.default_rng(0)
    colour = Image.fromarray(draw.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    deep = Image.fromarray(draw.integers(0, 65536, (30, 50), dtype=np.uint16))
    clear = colour.convert("RGBA")
    clear.putalpha(40)
    return {
        "turned.png": colour,
        "deep.png": deep,
        "palette.png": colour.quantize(8),
        "clear.png": clear,
        "grey.png": colour.convert("L"),
        "black_and_white.png": colour.convert("1"),
    }


@pytest.mark.parametrize("name", oddities())
def test_a_picture_is_read_alike_from_file_memory_and_array(
    run: Path, tmp_path: Path, name: str
) -> None:
    classifier, image, path = kw.load(run), oddities()[name], tmp_path / name
    exif = Image.Exif()
    if name.startswith("turned"):
        exif[0x0112] = 6
    image.save(path, exif=exif)
    expected = classifier.read(path)
    with Image.open(path) as opened:
        assert torch.equal(classifier.read(opened), expected)
        assert torch.equal(classifier.read(opened), expected)  # it is left open
    if not name.startswith("turned"):
        assert torch.equal(classifier.read(image), expected)
    if name in ("deep.png", "grey.png"):
        assert torch.equal(classifier.read(np.asarray(image)), expected)
    probabilities = [
        [p.probability for p in classifier.predict(one, k=4)[0]] for one in (path, expected)
    ]
    assert probabilities[0] == probabilities[1]


def test_arrays_and_tensors_that_mean_nothing_are_refused(run: Path) -> None:
    classifier = kw.load(run)
    array = np.zeros((30, 50, 3), np.uint8)
    ready = classifier.read(array)
    size = ready.shape[1]
    for one in (array, ready):
        assert len(classifier.predict(one)) == 1
    for several in (np.stack([array, array]), [array, array], torch.stack([ready, ready])):
        assert len(classifier.predict(several)) == 2
    for wrong in (
        array.astype(np.float32) / 255,
        array.transpose(2, 0, 1),
        np.zeros((30, 50, 4), np.uint8),
        np.zeros((30, 50), np.int64),
    ):
        with pytest.raises(ValueError, match=r"an array of .*expected RGB, uint8"):
            classifier.predict(wrong)
    for wrong in (ready / 255, ready[:, 1:], ready[0], torch.zeros(2, 3, size, size)):
        with pytest.raises(ValueError, match=rf"expected uint8 \[3, {size}, {size}\]"):
            classifier.predict(wrong)
    with pytest.raises(UserError, match="cannot read image of mode F"):
        classifier.predict(Image.new("F", (4, 4)))


def test_pictures_of_all_kinds(run: Path, images: Path) -> None:
    """A path, an image and a tensor of it, grey images, all classes at most."""
    classifier = kw.load(run)
    file = next((images / "val" / "cat").iterdir())
    image = Image.open(file).convert("RGB")
    one = classifier.predict(file, k=99)
    assert len(one) == 1
    assert sum(p.probability for p in one[0]) == pytest.approx(1)
    second = classifier.predict([image, image], k=99)[1]
    assert [p.label for p in second] == [p.label for p in one[0]]
    tensor = torch.stack([classifier.read(file)])
    assert [p.label for p in classifier.predict(tensor, k=99)[0]] == [p.label for p in one[0]]
    grey = Image.fromarray(np.full((50, 60), 128, np.uint8))
    assert classifier.read(grey).shape == (3, 40, 40)
    with pytest.raises(ValueError, match="k is 0"):
        classifier.predict(file, k=0)


def damaged(run: Path, tmp_path: Path) -> Path:
    (weights,) = run.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    path = tmp_path / weights.name
    path.write_bytes(content)
    return path


def renamed(run: Path, tmp_path: Path) -> Path:
    """Cut off, under a name without a hash."""
    (weights,) = run.glob("*.safetensors")
    path = tmp_path / "other.safetensors"
    path.write_bytes(weights.read_bytes()[:-8])
    return path


def foreign(run: Path, tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    return tmp_path / "foreign.safetensors"


def described(**changes: str) -> Any:
    """Our own file, with other words in its header."""

    def write(run: Path, tmp_path: Path) -> Path:
        from safetensors.torch import save_file

        texts = {**read_source(run).description.to_strings(), **changes}
        save_file({"a": torch.zeros(2)}, tmp_path / "d.safetensors", texts)
        return tmp_path / "d.safetensors"

    return write


def checkpoint(**meta: Any) -> Any:
    def write(run: Path, tmp_path: Path) -> Path:
        return write_checkpoint(tmp_path / "other.pth", SETTINGS, **meta)

    return write


def bare(run: Path, tmp_path: Path) -> Path:
    save_checkpoint({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def text(name: str) -> Any:
    def write(run: Path, tmp_path: Path) -> Path:
        (tmp_path / name).write_text("not a model")
        return tmp_path / name

    return write


def empty_folder(run: Path, tmp_path: Path) -> Path:
    return tmp_path


MISTAKES = {
    "none": (lambda run, tmp_path: tmp_path / "no.pth", "no.pth: no such file or folder; expected"),
    "folder": (empty_folder, r"expected a work directory of kw train"),
    "suffix": (text("a.h5"), r"expected a work directory .*, found '.h5'"),
    "damaged": (damaged, "is damaged: its SHA-256 begins with"),
    "cut off": (renamed, "cannot be read as safetensors"),
    "foreign": (foreign, "holds no description of a classifier"),
    "other weights": (described(), "is of another model"),
    "config": (described(config='{"model": {"name": "resnet18"}}'), "data"),
    "types": (described(classes='"bird"'), "its description is damaged .TypeError: expected list"),
    "json": (described(weights="{"), "its description is damaged .JSONDecodeError"),
    "classes": (described(classes='["bird"]'), "names 1 classes, its network has 4"),
    "without config": (bare, r"bare.pth: holds no configuration .meta.config."),
    "detector": (checkpoint(config="model = dict(\n    a=1)\n"), "is a detector's"),
    "too few": (checkpoint(classes=["a", "b"]), "names 2 classes, the network has 4"),
    "onnx": (text("a.onnx"), "a.onnx: onnxruntime refuses it"),
    "pt2": (text("a.pt2"), "a.pt2: cannot be read as a .pt2 file"),
}


@pytest.mark.parametrize(("write", "message"), MISTAKES.values(), ids=MISTAKES)
def test_other_files_are_answered(write: Any, message: str, run: Path, tmp_path: Path) -> None:
    if write.__qualname__.startswith("text") and "onnx" in message:
        pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=message):
        kw.load(write(run, tmp_path))


def test_no_average_and_no_classes(run: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(run / "best.pth")
    del saved["ema_state_dict"], saved["meta"]["classes"]
    save_checkpoint(saved, tmp_path / "epoch_2.pth")
    (tmp_path / "config.py").write_text("1 / 0  # of another project: no detector's\n")
    classifier = kw.load(tmp_path)
    assert classifier.classes == ["0", "1", "2", "3"]
    assert classifier.description.weights == "model"
    assert classifier.description.metrics == {"top1": 10.0}
    with pytest.raises(UserError, match="holds no moving average"):
        kw.load(tmp_path, weights="ema")


def test_figures_are_of_the_chosen_weights() -> None:
    meta = {"metrics": {"mAP": 0.5, "ema_mAP": 1, "mAP_s": None, "ema_mAP_l": 0.25}}
    assert figures_of(meta, "model") == {"mAP": 0.5}
    assert figures_of(meta, "ema") == {"mAP": 1.0, "mAP_l": 0.25}
    diverged = {"metrics": {"top1": 0.1, "loss": float("nan"), "f1": float("inf")}}
    assert figures_of(diverged, "model") == {"top1": 0.1}  # NaN is no JSON, which other tools read
    assert figures_of({}, "ema") == figures_of({"metrics": "?"}, "model") == {}


def test_weights_may_be_renamed_and_halved(run: Path, tmp_path: Path) -> None:
    """A name without a hash is not compared; half the bytes come back as float32."""
    written = export(read_source(run), tmp_path / "half.safetensors", Options("fp16"))
    plain = tmp_path / "plain.safetensors"
    shutil.copy(written.path, plain)
    (whole,) = run.glob("*.safetensors")
    assert plain.stat().st_size < 0.7 * whole.stat().st_size
    assert kw.load(plain).network.fc.weight.dtype == torch.float32
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(kw.load(plain)(images), kw.load(run)(images), atol=0.05, rtol=0.01)


def test_the_configuration_survives(run: Path) -> None:
    (weights,) = run.glob("*.safetensors")
    config = kw.load(run).description.config
    assert config.loggers  # left out, as folders of the machine are
    assert kw.load(weights).description.config == without_places(config)
    assert json.loads(kw.load(weights).description.to_strings()["preprocessing"]) == {
        "colour": "RGB",
        "exif_orientation": "apply",
        "resize_shorter_side": 45,  # floor(40 / 0.875)
        "interpolation": "bilinear",
        "centre_crop": 40,
        "scale": "1/255",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "layout": "float32 [batch, 3, height, width]",
    }


@pytest.mark.slow
def test_pt2_stays_on_the_cpu(run: Path, tmp_path: Path) -> None:
    written = export(read_source(run), tmp_path / "net.pt2", Options(batch=2, fixed_size=True))
    classifier = kw.load(written.path)
    assert classifier.description.input.least is None
    images = torch.zeros(3, 3, 40, 40, dtype=torch.uint8)  # more than the file takes at a time
    torch.testing.assert_close(classifier.logits(images), kw.load(run).logits(images))
    with pytest.raises(ExportError, match="on the CPU; use cpu"):
        kw.load(written.path, device="cuda")


@pytest.mark.parametrize(
    ("takes", "shapes", "others", "message"),
    [
        (
            InputRange(32),
            [(2, 3, 32, 32), (0, 3, 32, 32)],
            [(2, 3, 33, 32), (2, 3, 32, 31), (2, 1, 32, 32), (3, 32, 32)],
            r"the file takes \[B, 3, 32, 32\]$",
        ),
        (
            InputRange(32, least=9),
            [(2, 3, 9, 70)],
            [(2, 3, 9, 8), (2, 4, 9, 9), (2, 3, 9)],
            r"the file takes \[B, 3, H, W\], H and W from 9 on$",
        ),
        (InputRange(8, batch=4), [(4, 3, 8, 8)], [(3, 3, 8, 8)], r"takes \[4, 3, 8, 8\]$"),
        (
            InputRange((8, 12), channels=4),
            [(2, 4, 8, 12)],
            [(2, 4, 12, 8), (2, 4, 12, 12), (2, 4, 8, 8), (2, 3, 8, 12)],
            r"takes \[B, 4, 8, 12\]$",
        ),
    ],
)
def test_images_that_a_file_does_not_take(
    takes: InputRange, shapes: list[Any], others: list[Any], message: str, run: Path
) -> None:
    """What was traced takes some sizes; a network from weights takes any."""
    classifier = kw.load(run)
    exported = Classifier(
        torch.nn.Identity(), replace(classifier.description, input=takes), exported=True
    )
    for shape in shapes:
        assert exported(torch.zeros(shape)).shape == shape
    for shape in others:
        with pytest.raises(ValueError, match=message) as error:
            exported(torch.zeros(shape))
        assert f"images {list(shape)}" in str(error.value)
    assert classifier(torch.zeros(2, 3, 47, 50)).shape == (2, 4)
