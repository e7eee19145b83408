"""Pictures: the figures that they show, that they are drawn, and that training does not notice."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from networks import images as some_images
from networks import narrow_resnet, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kw import convert
from kw.config import ConfigError, config_from_mapping, load_config
from kw.peers.odconv import ODConv2d
from kw.pictures import (
    PictureError,
    assembled_kernels,
    cell_shares,
    cell_use,
    class_effect,
    class_maps,
    coefficients,
    dynamic_layers,
)
from kw.pictures.batches import draw_batch, label_mixture
from kw.pictures.cam import draw_cam
from kw.pictures.cells import draw_cells
from kw.pictures.coefficients import CellUse, DynamicLayer
from kw.pictures.heatmaps import draw_attention, draw_classes
from kw.pictures.history import Snapshot, draw_history
from kw.pictures.kernels import difference, draw_kernels, mosaic
from kw.pictures.method import (
    block_corner,
    draw_mixing,
    draw_partition,
    example,
    example_coefficients,
)
from kw.pictures.samples import few_of_each, spaced
from kw.pictures.style import check_matplotlib, to_pixels, to_tensor
from kw.training import build_trainer, load_checkpoint, train
from kw.training.distributed import Process
from kw.training.run_pictures import schedule_curves, training_batch
from kw.warehouse import KernelShape, KWConv2d, Warehouse
from kw.warehouse.ops.reference import assemble_reference
from kw.warehouse.partition import CellSlice

CPU = Process(0, 1, torch.device("cpu"))
DPI = 40
BY_HAND = DynamicLayer("a", "w", 2, 4, CellSlice(1, 3, (1, 2)))


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """Fewer pixels than in earnest: most of a picture's time goes into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kw.pictures.style._DPI", DPI)
        yield


# What the figures are.


def test_coefficients_are_the_layers_own() -> None:
    """Each layer's, from the input that it has; nothing of the network or the generators moves."""
    network = small().train()
    network[0].eval()  # modes differ, and are to stay
    x = some_images()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = coefficients(network, x)
    assert [module.training for module in network[:3]] == [False, True, True]
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]
    network.eval()
    with torch.no_grad():
        for name, layer in network.named_children():
            if name in found:
                tau = layer.warehouse.temperature
                assert torch.equal(found[name], layer.attention(layer.pooled(x), tau))
            if name != "warehouses":
                x = layer(x)
    assert list(found) == ["0", "2", "3"]
    assert list(coefficients(network, some_images(), ["2"])) == ["2"]


@pytest.mark.parametrize("ratio", [1, 2, 0.5])
def test_layers_know_their_own_cells(ratio: float) -> None:
    halves = {"cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5} if ratio < 1 else {}
    network = convert(narrow_resnet(), "resnet18", cell_num_ratio=ratio, start="paper", **halves)
    layers = dynamic_layers(network)
    assert len(layers) == 20
    for layer in layers:
        module = network.get_submodule(layer.name)
        assert torch.equal(layer.own_mask().float(), module.attention.one_hot)
        assert (layer.mixtures, layer.cells) == tuple(module.attention.one_hot.shape)
    for name, warehouse in network.warehouses.items():
        ends = [layer.own.stop for layer in layers if layer.warehouse == name]
        assert ends == sorted(ends)
        assert ends[-1] == warehouse.partition.cells


def test_use_and_shares_by_hand() -> None:
    first = torch.tensor([[[0.2, -0.4, 0.0, 0.1], [0.0, 0.3, 0.5, -0.1]]])
    second = torch.tensor([[[-0.2, 0.2, 0.0, 0.1], [0.0, 0.1, 0.5, 0.3]]])
    use = cell_use([{"a": first}, {"a": second}])["a"]
    expected = [[0.0, -0.1, 0.0, 0.1], [0.0, 0.2, 0.5, 0.1]]
    assert use.mean == pytest.approx(torch.tensor(expected, dtype=torch.float64), abs=1e-7)
    assert use.negative[0].tolist() == pytest.approx([0.1, 0.2, 0, 0])
    shares = cell_shares(use, BY_HAND)
    assert shares.own == pytest.approx(((0.1 + 0.5) / 2, 0.2 / 2))
    assert shares.layer == pytest.approx(((0 + 0.2) / 2, 0))
    assert shares.foreign == pytest.approx(((0.1 + 0.1 + 0.15) / 2, (0.1 + 0.05) / 2))
    assert shares.total == pytest.approx(float((first.abs() + second.abs()).sum()) / 4)
    assert shares.negative == pytest.approx(0.175 / shares.total)
    parts = [shares.part(name) for name in ("own", "layer", "foreign")]
    assert sum(parts) == pytest.approx(1)


def test_temperature_1_uses_own_cells_alone() -> None:
    network = small()
    network.warehouses["spatial"].temperature.fill_(1)
    use = cell_use([coefficients(network, some_images())])
    for layer in dynamic_layers(network)[:2]:
        assert cell_shares(use[layer.name], layer).part("own") == 1


def test_class_effect() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(8)
    alpha = torch.randn(40, 3, 4, generator=generator) + 0.7 * labels[:, None, None]
    deviation, effect = class_effect(alpha, labels)
    groups = [alpha[labels == label].double().numpy() for label in range(5)]
    means = np.stack([group.mean((0, 1)) for group in groups])
    assert deviation.numpy() == pytest.approx(means - means.mean(0))
    within = sum(((group - group.mean(0)) ** 2).sum() for group in groups) / (40 - 5)
    total = ((alpha.double() - alpha.double().mean(0)) ** 2).sum().item() / (40 - 1)
    assert effect == pytest.approx(1 - within / total)
    assert class_effect(labels[:, None, None].float(), labels)[1] == pytest.approx(1)
    noise = [class_effect(torch.randn(40, 3, 4, generator=generator), labels)[1] for _ in range(30)]
    assert abs(sum(noise) / 30) < 0.01  # plain eta squared is 4 / 39 here
    with pytest.raises(PictureError, match="expected at least two classes"):
        class_effect(alpha, torch.zeros(40))


def test_kernels_are_those_of_the_definition() -> None:
    network, x = small().eval(), some_images()
    kernels = assembled_kernels(network, x, ["2", "3"])
    alpha = coefficients(network, x)
    for name, kernel in kernels.items():
        layer = network.get_submodule(name)
        expected = [assemble_reference(a, layer.warehouse.cells, layer.spec) for a in alpha[name]]
        assert torch.allclose(kernel, torch.stack(expected), atol=1e-6)
    assert difference(kernels["3"][0], kernels["3"][0]) == 0
    assert difference(torch.tensor([3.0, 0]), torch.tensor([0, 3.0])) == pytest.approx(2**0.5)


@pytest.mark.parametrize("kernels", [1, 3])
def test_kernels_of_odconv_have_all_its_factors(kernels: int) -> None:
    """A convolution with the kernel of an image is what the layer computes for it."""
    torch.manual_seed(0)
    odconv = {"kernels": kernels, "bias": False}
    network = nn.Sequential(
        ODConv2d(8, 16, 3, padding=1, groups=2, **odconv),
        ODConv2d(16, 16, 1, **odconv),
        ODConv2d(16, 16, 3, padding=1, groups=16, **odconv),
    ).eval()
    x = torch.randn(2, 8, 9, 9)
    found = assembled_kernels(network, x, ["0", "1", "2"])
    with torch.no_grad():
        for layer, kernel in zip(network, found.values(), strict=True):
            settings = {"padding": kernel.shape[-1] // 2, "groups": layer.groups}
            y = [nn.functional.conv2d(x[i : i + 1], kernel[i], **settings) for i in range(2)]
            x = layer(x)
            assert torch.allclose(torch.cat(y), x, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 3, 3, 3), (15, 11)),
        ((200, 100, 1, 1), (96, 96)),
        ((24, 1, 7, 7), (15, 79)),  # depthwise: two rows of ten
        ((3, 2, 5), (5, 11)),
        ((3, 2, 3, 2, 2), (8, 5)),
    ],
)
def test_mosaic(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    kernel = torch.randn(shape)
    drawn = mosaic(kernel)
    assert drawn.shape == expected
    assert drawn[0, 0] == kernel.flatten(2)[0, 0, 4 if len(shape) == 5 else 0]


def test_blocks_lie_where_they_are_drawn() -> None:
    shape = KernelShape(6, 8, (3, 2))
    warehouse = Warehouse([shape], cell_ratios(0.5))
    layer = KWConv2d(8, 6, (3, 2), warehouse=warehouse)
    part = layer.partition
    cells = torch.arange(part.mixtures, dtype=torch.float32)[:, None].expand(-1, 3 * 4)
    kernel = assemble_reference(torch.eye(part.mixtures), cells, layer.spec)
    for mixture in range(part.mixtures):
        position, first_out, first_in = block_corner(part, mixture)
        block = kernel.flatten(2)[first_out : first_out + 3, first_in : first_in + 4, position]
        assert block.unique().tolist() == [mixture]


def cell_ratios(ratio: float) -> Any:
    from kw.warehouse import WarehouseSettings

    return WarehouseSettings(cell_inplane_ratio=ratio, cell_outplane_ratio=ratio)


def test_maps_are_cam_before_a_linear_classifier() -> None:
    network = convert(narrow_resnet(), "resnet18", start="paper").eval()
    x = torch.randn(2, 3, 96, 96)
    classes = torch.tensor([3, 0])
    found = class_maps(network, x, classes, least=3)
    with torch.no_grad():
        features, logits = network.forward_features(x), network(x)
    expected = (network.fc.weight[classes][:, :, None, None] * features).sum(1).relu() / 9
    assert found.module == "layer4"
    assert torch.allclose(found.maps, expected, atol=1e-5)
    assert torch.allclose(found.probabilities, logits.softmax(1)[[0, 1], classes], atol=1e-5)
    assert class_maps(network, x).module == "layer2"  # 12 x 12: the deepest with 7 positions
    assert class_maps(network, x).classes.tolist() == logits.argmax(1).tolist()


def test_maps_of_a_network_whose_channels_are_last() -> None:
    sizes = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    sizes |= {"img_size": 64, "window_size": 2, "num_classes": 5}
    network: Any = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
    network.norm = nn.Identity()  # so that the mean and the classifier follow the last stage
    x, classes = torch.randn(2, 3, 64, 64), torch.tensor([3, 0])
    with torch.no_grad():
        features = network.forward_features(x)  # [B, h, w, c]
    expected = torch.einsum("bhwc,bc->bhw", features, network.head.fc.weight[classes]).relu() / 4
    assert torch.allclose(class_maps(network, x, classes, least=2).maps, expected, atol=1e-5)


BACKBONES = {
    "mobilenetv2_050": ("mobilenetv2_1x", 64, {}),
    "convnext_atto": ("convnext_tiny", 64, {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
    "deit_tiny_patch16_224": ("deit", 64, {"embed_dim": 48, "img_size": 64}),
    "resnet18": ("resnet18", 64, {"channels": [8, 8, 16, 16]}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone(name: str) -> None:
    """Coefficients of all its layers, and a map; parameters are as they were."""
    plan, size, arguments = BACKBONES[name]
    torch.manual_seed(0)
    network = convert(timm.create_model(name, num_classes=3, **arguments), plan, start="paper")
    x = torch.randn(2, 3, size, size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(x)  # or activations of fresh weights leave ReLU6's range, and there is no gradient
    layers, found = dynamic_layers(network), coefficients(network, x)
    for layer in layers:
        assert found[layer.name].shape == (2, layer.mixtures, layer.cells)
    maps = class_maps(network, x, least=4)
    assert min(maps.maps.shape[1:]) >= 4
    assert maps.maps.amin() >= 0
    assert maps.maps.amax() > 0
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert network.training


def test_a_static_network_has_nothing_to_show() -> None:
    with pytest.raises(PictureError, match="ResNet is a static network"):
        dynamic_layers(narrow_resnet())
    with pytest.raises(PictureError, match="does not tell its stages"):
        class_maps(nn.Linear(3, 2), torch.randn(1, 3))


@pytest.mark.parametrize(
    ("target", "smoothing", "expected"),
    [
        (torch.tensor(1), 0.0, "dog"),
        (torch.tensor([0.0, 0.0, 1.0]), 0.0, "fox"),
        (torch.tensor([0.3, 0.7, 0.0]), 0.0, "dog 0.70 + cat 0.30"),
        (torch.tensor([0.03, 0.94, 0.03]), 0.09, "dog 0.94"),
        (torch.tensor([0.4, 0.57, 0.03]), 0.09, "dog 0.57 + cat 0.40"),
    ],
)
def test_label_mixture(target: torch.Tensor, smoothing: float, expected: str) -> None:
    assert label_mixture(target, ["cat", "dog", "fox"], smoothing) == expected


def test_labels_of_several_classes() -> None:
    target = torch.tensor([0.95, 0.05, 0.95])
    found = label_mixture(target, ["cat", "dog", "fox"], 0.1, several=True)
    assert found == "cat 0.95 + fox 0.95"


def test_which_images() -> None:
    assert spaced(10, 5) == [1, 3, 5, 7, 9]
    assert spaced(3, 8) == [0, 1, 2]
    labels = [0] * 6 + [1] * 6 + [2] * 6 + [3]
    found = few_of_each(labels, 3, 9)
    assert [labels[i] for i in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert few_of_each(labels, 4, 1) == [1, 4, 7, 10, 13, 16, 18]  # two of each, where there are


def test_schedule_curves(settings: dict[str, Any]) -> None:
    settings["epochs"] = 4
    curves = schedule_curves(config_from_mapping(settings), updates=2)
    assert list(curves.epochs) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert curves.temperature == [1, 0.5, 0, 0, 0, 0, 0, 0]
    assert curves.lr[:2] == [0.002, 0.002]  # half an epoch of warm-up is one update here
    assert curves.lr[-1] == pytest.approx(1e-6 + 0.001999 * 0.5 * (1 + np.cos(np.pi * 6 / 7)))
    assert curves.marks == {"warm-up ends": 0.5, "temperature is 0": 1}
    # How long updates take in epochs, nobody knows without the data.
    settings["schedule"] = {"warmup_updates": 500}
    curves = schedule_curves(config_from_mapping(settings), updates=2)
    assert (curves.lr[0], list(curves.marks)) == (0.002, ["temperature is 0"])
    settings.update(temperature_epochs=0, schedule={"name": "step", "milestones": [2, 3]})
    curves = schedule_curves(config_from_mapping(settings), updates=1)
    assert curves.temperature is None
    assert curves.lr == pytest.approx([2e-3, 2e-3, 2e-4, 2e-5])
    assert curves.marks == {"step 1": 2, "step 2": 3}


# How they are drawn.


def fake_use(layers: list[DynamicLayer]) -> dict[str, CellUse]:
    generator = torch.Generator().manual_seed(0)
    alpha = {x.name: torch.randn(1, x.mixtures, x.cells, generator=generator) for x in layers}
    return cell_use([alpha])


@pytest.mark.parametrize(
    "cells", [[(1, 1)], [(3, 5), (400, 700), (2, 4)]], ids=["one cell", "large and odd"]
)
def test_panels(cells: list[tuple[int, int]]) -> None:
    """One panel and one colour bar a warehouse, or two; pixels of the size that was asked for."""
    layers = [
        DynamicLayer(f"layer{i}", f"w{i}", m, n, CellSlice(0, min(m, n), (0,) * m))
        for i, (m, n) in enumerate(cells)
    ]
    use, count = fake_use(layers), len(cells)
    effects = {x.name: (use[x.name].mean[:1], 0.5) for x in layers}
    for figure in (
        draw_attention(layers, use, "t"),
        draw_classes(layers, effects, ["a", "b"], "t"),
    ):
        shown = [axes for axes in figure.axes if axes.axison]
        assert len(shown) == 2 * count
        pixels = to_tensor(figure)
        assert pixels.shape[0] == 3
        assert pixels.shape[2] == 9 * DPI
    assert len(draw_cells(layers, use, "t").axes) == 3 * count


def test_other_pictures_have_their_panels() -> None:
    layers = [BY_HAND]
    use = fake_use(layers)
    snapshots = [Snapshot(epoch, 1 / (epoch + 1), use) for epoch in range(6)]
    drawn = draw_history(layers, snapshots, "w", "t")
    assert len(drawn.axes) == 4 * 2 + 3 * 2 + 3  # maps and bars, shares and bars, temperatures
    assert len(draw_history(layers, [Snapshot(1, None, use)], "w", "t").axes) == 2 + 3 * 2
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    kernels = {"a": torch.randn(2, 4, 3, 3, 3), "b": torch.randn(2, 4, 1, 7, 7)}
    assert len(draw_kernels(kernels, pictures, ["x", "y"], "t").axes) == 3 + 2 * 3 * 2
    network = convert(narrow_resnet(), "resnet18", start="paper")
    for count, panels in ((1, 2), (7, 20)):
        found = class_maps(network, torch.randn(count, 3, 32, 32))
        pictures = np.zeros((count, 32, 32, 3), np.uint8)
        drawn = draw_cam(pictures, found, ["a/very/long/name/of/a/file.png"] * count, "abcde", "t")
        assert len(drawn.axes) == panels
    for count, panels in ((1, 1), (9, 16), (33, 32)):
        pictures = np.zeros((count, 4, 4, 3), np.uint8)
        drawn = draw_batch(pictures, ["cat 0.6 + dog 0.4"] * count, "t")
        assert len(drawn.axes) == panels
    assert "first 32 of 33" in drawn.get_suptitle()
    assert len(draw_partition().axes) == 4
    assert len(draw_mixing().axes) == 3 * 2 + 1 + 5


@pytest.mark.parametrize("name", ["cost $x_$", "5$ + 10$", os.fsdecode(b"caf\xe9")])
def test_names_are_drawn_as_they_are(name: str) -> None:
    """What stands between two dollars is no formula, and a name may be no text."""
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    drawn = to_tensor(draw_batch(pictures, [name], name))
    assert not torch.equal(drawn, to_tensor(draw_batch(pictures, [""], name)))
    assert not torch.equal(drawn, to_tensor(draw_batch(pictures, [name], "")))


@pytest.mark.parametrize("count", [1, 3, 32])
def test_long_labels_stay_below_their_images(count: int) -> None:
    """ImageNet's names: no label reaches its neighbour, an image or the sheet's end."""
    names = (
        "Cardigan, Cardigan Welsh corgi 0.62 + black-and-tan coonhound, or something longer 0.38"
    )
    drawn = draw_batch(np.zeros((count, 8, 8, 3), np.uint8), [names] * count, "t")
    to_tensor(drawn)
    sheet = drawn.bbox.padded(1)  # of rounding
    labels = [axes.xaxis.label.get_window_extent() for axes in drawn.axes]
    boxes = [axes.get_window_extent() for axes in drawn.axes]
    for i, label in enumerate(labels):
        assert sheet.x0 <= label.x0
        assert label.x1 <= sheet.x1
        assert sheet.y0 <= label.y0
        others = labels[:i] + labels[i + 1 :] + boxes
        assert not any(label.overlaps(other) for other in others)
    assert all(" 0.62\n" in axes.get_xlabel() for axes in drawn.axes)
    area = sum(box.width * box.height for box in boxes)
    assert area > 0.5 * sheet.width * sheet.height


def test_the_example_is_the_method() -> None:
    layers, pooled = example()
    assert [x.own.stop for x in dynamic_layers(layers)] == [9, 27, 29]
    ones = torch.cat(example_coefficients(layers, pooled, 1.0))
    assert torch.equal(ones, torch.eye(29))
    alpha = example_coefficients(layers, pooled, 0.0)[0]
    assert alpha.abs().sum(1).amax() < 1
    assert alpha.abs().amax() < 0.5  # the papers' start: mixed, not one-hot


def test_pixels_are_the_image() -> None:
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.full((1, 3, 1, 1), 120.0), torch.full((1, 3, 1, 1), 60.0)
    assert np.array_equal(to_pixels((image - mean) / std, mean, std), image.permute(0, 2, 3, 1))


# A run with pictures.


@pytest.fixture(scope="module")
def recipe(images: Path) -> dict[str, Any]:
    """Everything that draws random numbers, and BatchNorm."""
    return {
        "model": {
            "name": "resnet18",
            "num_classes": 4,
            "drop_path_rate": 0.2,
            "timm_args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
            "kernel_warehouse": {"plan": "resnet18", "start": "paper"},
        },
        "data": {
            "root": str(images),
            "input_size": 32,
            "workers": 0,
            "mixup": 0.8,
            "cutmix": 1.0,
            "random_erasing": {"probability": 0.5},
        },
        "optimizer": {"name": "adamw", "lr": 0.002},
        "ema": {"decay": 0.9},
        "temperature_epochs": 1,
        "epochs": 2,
        "total_batch_size": 16,
        "batch_size": 8,
        "log_interval": 4,
    }


@pytest.fixture(scope="module")
def run_dir(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(config_from_mapping({**recipe, "pictures": {"images": 5}}), folder)
    return folder


@pytest.mark.slow
def test_a_run_does_not_notice_its_pictures(
    recipe: dict[str, Any], run_dir: Path, tmp_path: Path
) -> None:
    """Weights, average, optimizer and generators, to the bit; also resumed in between."""
    train(config_from_mapping(recipe), tmp_path)
    for name in ("epoch_1.pth", "epoch_2.pth"):
        plain, drawn = load_checkpoint(tmp_path / name), load_checkpoint(run_dir / name)
        for part in ("state_dict", "ema_state_dict", "optimizer"):
            assert_equal(plain[part], drawn[part], f"{name}: {part}")
        assert_equal(plain["ranks"][0]["rng"], drawn["ranks"][0]["rng"], name)
    plain, drawn = (
        [json.loads(line)["loss"] for line in (d / "log.jsonl").read_text().splitlines()]
        for d in (tmp_path, run_dir)
    )
    assert plain == drawn


def assert_equal(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_tensorboard_has_the_pictures(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    expected = {f"pictures/{name}" for name in ("batch", "attention", "cells")}
    assert set(events.Tags()["images"]) == expected
    for name in expected:
        assert [event.step for event in events.Images(name)] == [4, 8]  # after either epoch
        assert events.Images(name)[0].encoded_image_string.startswith(b"\x89PNG")
    scalars = [events.Scalars(f"cells/layer1/{part}") for part in ("own", "layer", "foreign")]
    for values in zip(*scalars, strict=True):
        assert sum(value.value for value in values) == pytest.approx(1, abs=1e-5)


def test_a_static_run_has_pictures_of_batches(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = {**recipe["model"], "kernel_warehouse": None}
    static = {**recipe, "model": model, "temperature_epochs": 0, "epochs": 1, "pictures": {}}
    train(config_from_mapping(static), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["pictures/batch"]


def test_batches_are_those_of_training(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = config_from_mapping(recipe)
    trainer = build_trainer(config, tmp_path, CPU)
    seen: list[torch.Tensor] = []
    network = trainer.task.network

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            seen.append(inputs[0].clone())

    network.register_forward_pre_hook(keep)
    trainer.train()
    assert len(seen) == 2 * 4 * 2  # epochs, updates, micro-batches
    for epoch, update in ((1, 1), (2, 3)):
        images, targets, classes = training_batch(config, epoch, update)
        assert torch.equal(images, seen[8 * (epoch - 1) + 2 * (update - 1)])
        assert targets.shape == (8, 4)
        assert classes == ["bird", "cat", "dog", "fish"]
    with pytest.raises(ConfigError, match="--update 5: the run has 4"):
        training_batch(config, 1, 5)


def test_a_title_says_how_many_images_there_are(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kw.training import network_pictures

    titles = []

    def draw(layers: Any, use: Any, title: str) -> Any:
        titles.append(title)
        return draw_cells(layers, use, title)

    monkeypatch.setattr(network_pictures, "draw_cells", draw)
    config, out = load_config(run_dir / "config.yaml"), tmp_path / "cells.png"
    network_pictures.picture_cells(config, run_dir / "best.pth", out, layers="layer1.*", images=99)
    assert titles[0].endswith(", 19 test images")


KINDS = [
    "attention {run} --images 4 --layers layer1.*",
    "attention {config} {run}/best.pth --images 12 --over classes --layers layer4.*",
    "cells {config} {run}/best.pth --images 4",
    "kernels {run}/best.pth {image} {other}",
    "cam {run} {image} {other} {image}",
    "batches {run}",
    "history {run} --images 3 --warehouse layer4",
    "batches {config} --epoch 2",
    "schedules {config}",
    "mixing",
]


def words_of(line: str, run_dir: Path, images: Path) -> list[str]:
    names = {"config": run_dir / "config.yaml", "run": run_dir}
    names |= {"image": images / "val/cat/0.png", "other": images / "val/fish/1.png"}
    return ["tools/visualize.py", *line.format(**names).split()]


@pytest.mark.parametrize("line", KINDS, ids=[line.split(" --")[0] for line in KINDS])
def test_every_kind(
    line: str, run_dir: Path, images: Path, tmp_path: Path, tool: Callable[..., None]
) -> None:
    out = tmp_path / "new" / "picture.png"
    tool(*words_of(line, run_dir, images), "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")


MISTAKES = [
    ("attention {config} {run}/none.pth", ["none.pth", "no such file"]),
    ("attention {config} {run}/best.pth --layers layer9", ["--layers 'layer9'", "no dynamic"]),
    ("attention {config} {run}/best.pth --layers (", ["--layers '('", "no regular expression"]),
    ("attention {config} {run}/best.pth --images 0", ["--images", "expected an integer >= 1"]),
    ("attention {config} {run}/best.pth --over classes --classes 1", ["--classes", ">= 2"]),
    ("kernels {config} {run}/best.pth {image}", ["required: IMAGE"]),
    ("cam {config} {run}/best.pth {run}/log.jsonl", ["log.jsonl", "cannot read image"]),
    ("history {run}/tensorboard", ["expected checkpoints epoch_N.pth"]),
    ("history {run} --warehouse layer7", ["--warehouse 'layer7'", "layer1, layer2"]),
    ("batches {config} --epoch 3", ["--epoch 3", "the run has 2"]),
    ("batches {config} --cfg-options data.root=nowhere", ["data.root nowhere"]),
    ("schedules {config} --out {run}/picture.gif", ["picture.gif", ".pdf, .png, .svg"]),
    ("schedules {config} --out {run}", ["is a folder"]),
    ("detections {config} {run}/best.pth", ["expected a detector's configuration"]),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes(
    line: str,
    words: list[str],
    run_dir: Path,
    images: Path,
    tmp_path: Path,
    tool: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = words_of(line, run_dir, images)
    if "--out" not in arguments:
        name = "folder" if line.startswith("detections") else "picture.png"
        arguments += ["--out", str(tmp_path / name)]
    with pytest.raises(SystemExit) as end:
        tool(*arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not list(tmp_path.iterdir())


def test_a_static_network_gets_one_message(
    recipe: dict[str, Any], tmp_path: Path, run_dir: Path
) -> None:
    from kw import build_model
    from kw.training.network_pictures import picture_cells

    options = ["model.kernel_warehouse=null", "temperature_epochs=0"]
    config = load_config(run_dir / "config.yaml", options)
    static = {**recipe, "model": {**recipe["model"], "kernel_warehouse": None}}
    network = build_model({**static, "temperature_epochs": 0})
    torch.save({"state_dict": network.state_dict()}, tmp_path / "static.pth")
    with pytest.raises(PictureError, match="static network"):
        picture_cells(config, tmp_path / "static.pth", tmp_path / "x.png", layers=None, images=2)


def test_without_matplotlib(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run, not after its first epoch."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PictureError, match=r"pip install 'kernelwarehouse\[demo\]'"):
        build_trainer(config_from_mapping({**recipe, "pictures": {}}), Path("nowhere"), CPU)


def test_settings_of_matplotlib_that_refuse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    with pytest.raises(PictureError, match=r"text\.usetex is on, .* to False"):
        check_matplotlib()
    # What a notebook sets for the processes that it starts, also in an environment without it.
    monkeypatch.setenv("MPLBACKEND", "not_here")
    monkeypatch.delitem(sys.modules, "matplotlib")  # a new process reads it
    with pytest.raises(PictureError, match=r"'not_here' .* for backend.*: unset MPLBACKEND"):
        check_matplotlib()
    with (
        pytest.raises(PictureError, match=r"\(numpy.dtype size changed\): pip install"),
        patch("builtins.__import__", side_effect=ValueError("numpy.dtype size changed")),
    ):
        check_matplotlib()
