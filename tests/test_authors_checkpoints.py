"""The authors' checkpoints: translated whole or refused, and their outputs kept.

The released files are made from their key lists with random values; what such a network gives is
computed by ``authors_reference.py``, which knows the authors' names alone.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from authors_reference import Reference, State
from breadth import breadth
from make_released_keys import FIXTURE
from test_tools import call
from torch import Tensor, nn

import kw
from kw.config import config_from_mapping, load_config
from kw.models import PAPER_MODELS, build_network
from kw.models.authors_checkpoints import (
    FAMILIES,
    AuthorsFileError,
    read_authors_file,
    translate,
)
from kw.training import CheckpointError, load_checkpoint, load_network, train

KEYS: dict[str, dict[str, Any]] = json.loads(lzma.decompress(FIXTURE.read_bytes()))
TOLERANCE = 1e-6  # of the largest value


def config_of(released: str) -> dict[str, Any]:
    """The network of a released configuration: kw1d2x_resnet18 is our kw_resnet18_1d2x."""
    ratio, _, backbone = released.removeprefix("kw").rpartition("x_")
    model: dict[str, Any] = {"name": backbone}
    if ratio:
        ours = PAPER_MODELS[f"kw_{backbone}_{ratio}x"]
        assert ours.backbone == backbone
        model["kernel_warehouse"] = {"plan": ours.plan, "start": "paper", **ours.settings}
    return {
        "model": model,
        "data": {"root": "none"},
        "optimizer": {"lr": 0.1},
        "epochs": 1,
        "total_batch_size": 1,
        "batch_size": 1,
    }


# One of every family and every way of sharing, the smaller where several are alike.
COMPUTED = [
    "resnet50",
    "mobilenetv2_050",
    "convnext_tiny",
    "kw1x_resnet18",
    "kw1d4x_resnet18",
    "kw1d2x_resnet50",
    "kw1x_mobilenetv2_100",
    "kw1d2x_mobilenetv2_050",
    "kw4x_mobilenetv2_050",
    "kw1x_convnext_tiny",
]


@cache
def meta_network(released: str) -> tuple[nn.Module, str]:
    """A network without data, and timm's name of its backbone."""
    model = config_from_mapping(config_of(released)).model
    with torch.device("meta"):
        return build_network(model), model.name


def empty_state(released: str) -> State:
    shapes = KEYS[released]["state"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def random_state(released: str, seed: int = 0) -> State:
    """Values of which none is zero, none like another, and no branch without effect."""
    torch.manual_seed(seed)
    state = {}
    for name, shape in KEYS[released]["state"].items():
        value = torch.randn(shape)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif name.endswith("running_var"):
            value = 1 + value.abs()
        elif name.startswith("warehouse_manager"):
            # Mixed with coefficients of about 1 / n, in a kernel of some 8 cells' input channels.
            value *= (shape[0] / (8 * shape[2])) ** 0.5
        elif len(shape) > 1 and not name.endswith("gamma"):
            value *= value[0].numel() ** -0.5
        else:
            value = 0.1 * value + (1 if name.endswith(("weight", "gamma")) else 0)
        state[name] = value
    return state


def assert_agrees(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, f"{what}: {error:.1e} of the largest value"


def test_fixture_is_complete():
    assert len(KEYS) == 20
    assert sum(name.startswith("kw") for name in KEYS) == 15


@pytest.mark.parametrize("released", KEYS)
def test_every_released_state_fits_strictly(released):
    network, backbone = meta_network(released)
    assert sum(p.numel() for p in network.parameters()) == KEYS[released]["parameters"]
    state = translate(empty_state(released), network, backbone, released)
    assert list(state) == list(network.state_dict())
    network.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize(
    "released",
    breadth(COMPUTED, ["kw1x_resnet18", "kw1d4x_resnet18", "kw1x_mobilenetv2_100"]),
)
@torch.no_grad()
def test_outputs_are_the_authors(released):
    """Logits, and what every layer gives, at the temperatures of training and evaluation.

    In float64: with random weights, these networks amplify rounding beyond the tolerance.
    """
    names = KEYS[released]["warehouse_names"]
    _, backbone = meta_network(released)
    family = next(f for f in FAMILIES.values() if f.fits(backbone))
    network = kw.build_model(config_of(released)).eval().double()
    outputs: State = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    state = {name: value.double() for name, value in random_state(released).items()}
    images = torch.randn(2, 3, 64, 64).double()
    for tau in (0.0, 0.3, 1.0) if names else (0.0,):
        reference = Reference(state, names, tau, calibrate=True)
        expected = reference.forward(images)
        assert (expected[0] - expected[1]).abs().mean() > 0.02  # images differ
        network.load_state_dict(translate(state, network, backbone, released))
        if names:
            kw.set_temperature(network, tau)
        logits = network(images)
        for name, y in reference.outputs.items():
            ours = outputs[family.rename(f"{name}.")[:-1]]
            # A linear layer takes and gives channels last; theirs is a convolution here.
            ours = ours.movedim(-1, 1) if ours.dim() == 4 and ours.shape != y.shape else ours
            assert_agrees(ours.reshape(y.shape), y, f"{name} at tau {tau}")
        assert_agrees(logits, expected, f"logits at tau {tau}")


@pytest.mark.parametrize("one_backbone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_other_network_is_refused(one_backbone):
    """None of the 20 loads into any of the others, of one backbone or another, not even partly."""
    for released in KEYS:
        state, own = empty_state(released), meta_network(released)[1]
        for other in KEYS:
            network, backbone = meta_network(other)
            if other != released and (backbone == own) is one_backbone:
                with pytest.raises(AuthorsFileError, match="not of this configuration's network"):
                    translate(state, network, backbone, released)


@pytest.mark.parametrize(
    ("released", "other", "expected"),
    [
        (
            "resnet50",
            "resnet18",
            r"resnet50\.pth .*\n  unexpected \(.*layer1\.0\.conv3\.weight.*; and \d+ more\n"
            r"  mis-shaped \(.*: layer1\.0\.conv1\.weight is \[64, 64, 1, 1\]",
        ),
        (
            "kw4x_resnet18",
            "kw1x_resnet18",
            r"network:\n  mis-shaped \(.*warehouse_manager\.weights\.0 is \[224, 64, 64, 1, 1\], "
            r"layer1\.0\.conv1\.warehouse\.weight is \[56, 64, 64, 1, 1\]",
        ),
        (
            "kw1x_mobilenetv2_050",
            "mobilenetv2_050",
            r"missing \(.*: conv_stem\.weight.*\n  unexpected \(\d+\): warehouse_manager",
        ),
    ],
)
def test_differences_are_listed(released, other, expected):
    network, backbone = meta_network(other)
    with pytest.raises(AuthorsFileError, match=expected):
        translate(empty_state(released), network, backbone, f"{released}.pth")


def test_cells_of_equal_size_and_other_shape_are_refused():
    network, backbone = meta_network("kw1x_mobilenetv2_100")
    state = empty_state("kw1x_mobilenetv2_100")
    state["warehouse_manager.weights.2"] = torch.empty(34, 16, 8, 1, 1, device="meta")
    with pytest.raises(
        AuthorsFileError, match=r"mis-shaped \(1\): .*weights\.2 is \[34, 16, 8, 1, 1\]"
    ):
        translate(state, network, backbone, "file")


def test_two_names_for_one_are_refused():
    network, backbone = meta_network("mobilenetv2_100")
    state = empty_state("mobilenetv2_100")
    state["classifier.bias"] = state["classifier.1.bias"]
    with pytest.raises(AuthorsFileError, match=r"classifier\.1\.bias and classifier\.bias both"):
        translate(state, network, backbone, "file")


def test_family_without_release_is_refused():
    with pytest.raises(AuthorsFileError, match=r"deit_tiny_patch16_224.*ResNet.*ConvNeXt"):
        translate({}, nn.Module(), "deit_tiny_patch16_224", "file")


STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.num_batches_tracked": torch.tensor(7)}
AVERAGE = {name: value + 1 for name, value in STATE.items()}
ARGUMENTS = argparse.Namespace(lr=4e-3, opt_betas=[0.9, 0.999], model="kw_resnet18", nested=None)


def prefixed(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("content", "model", "average", "epoch"),
    [
        (STATE, STATE, None, None),
        (prefixed(STATE), STATE, None, None),
        ({"model": STATE, "args": ARGUMENTS, "epoch": 299, "scaler": {}}, STATE, None, 299),
        ({"state_dict": prefixed(STATE), "arch": "resnet18", "epoch": 3}, STATE, None, 3),
        ({"model": {"state_dict": prefixed(STATE)}}, STATE, None, None),
        ({"model": STATE, "model_ema": AVERAGE}, STATE, AVERAGE, None),
        ({"model": STATE, "model_ema": None}, STATE, None, None),
        ({"state_dict": STATE, "state_dict_ema": prefixed(AVERAGE)}, STATE, AVERAGE, None),
        ({"model_ema": {"state_dict": AVERAGE}}, None, AVERAGE, None),
    ],
)
def test_unwrapping(tmp_path: Path, content, model, average, epoch):
    torch.save(content, tmp_path / "file.pth")
    weights = read_authors_file(tmp_path / "file.pth")
    for found, expected in ((weights.model, model), (weights.average, average)):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert list(found) == list(expected)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert weights.epoch == epoch


class Command:
    """Runs a command when it is unpickled by an unsafe reader."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Arguments(argparse.Namespace):
    pass


def test_code_is_refused(tmp_path: Path):
    marker = tmp_path / "ran"
    for foreign in (Command(f"touch {marker}"), Arguments(lr=1)):
        torch.save({"model": STATE, "args": foreign}, tmp_path / "file.pth")
        with pytest.raises(
            AuthorsFileError, match=r"holds \S+(system|Arguments), which is neither"
        ):
            read_authors_file(tmp_path / "file.pth")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"no checkpoint", "cannot be read"),
        (b"", "cannot be read"),
        (None, "no such file"),
        ({"optimizer": {"lr": 1}, "epoch": 3}, "no network's state.*found optimizer, epoch"),
        ({"model": {"config": "resnet18"}}, "no network's state"),
        ([1, 2], "found list"),
        ({}, "found nothing"),
    ],
)
def test_files_without_network(tmp_path: Path, content, expected):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(AuthorsFileError, match=rf"file\.pth: .*{expected}"):
        read_authors_file(path)


@pytest.fixture
def released_run(settings: dict[str, Any], tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A configuration for the four classes of the test images, a released file with as many, and
    what the file holds."""
    settings["model"] = {**config_of("kw1x_mobilenetv2_050")["model"], "num_classes": 4}
    config, source = tmp_path / "config.yaml", tmp_path / "released.pth"
    config.write_text(yaml.safe_dump(settings))
    content: dict[str, Any] = {"args": ARGUMENTS, "epoch": 149}
    for seed, key in enumerate(("model", "model_ema")):
        state = random_state("kw1x_mobilenetv2_050", seed)
        content[key] = {k: v[:4] if k.startswith("classifier") else v for k, v in state.items()}
    torch.save({**content, "model": prefixed(content["model"])}, source)
    return config, source, content


def test_tool(released_run, tmp_path: Path):
    """A converted file is evaluated by tools/test.py, and not mistaken for one to resume from."""
    config, source, content = released_run
    target, results = tmp_path / "new" / "target.pth", tmp_path / "results.json"
    done = call("tools/convert_checkpoint.py", source, config, target)
    assert f"model, {len(content['model'])} tensors -> state_dict" in done.stdout
    assert f"ema, {len(content['model_ema'])} tensors -> ema_state_dict" in done.stdout
    call("tools/test.py", config, target, "--json", results)
    found = json.loads(results.read_text())
    assert (found["images"], found["weights"], found["epoch"]) == (19, "ema", 149)
    with pytest.raises(CheckpointError, match="weights alone"):
        train(load_config(config), tmp_path / "run", resume=target)


@pytest.mark.parametrize(
    ("weights", "states"),
    [
        ("all", {"state_dict": "model", "ema_state_dict": "model_ema"}),
        ("model", {"state_dict": "model"}),
        ("ema", {"state_dict": "model_ema"}),
    ],
)
def test_choice_of_weights(released_run, tool, tmp_path: Path, weights, states):
    config, source, content = released_run
    target = tmp_path / "target.pth"
    tool("tools/convert_checkpoint.py", source, config, target, "--weights", weights)
    checkpoint = load_checkpoint(target)
    assert set(checkpoint) == {"meta", *states}
    network = build_network(load_config(config).model)
    for key, theirs in states.items():
        load_network(network, checkpoint[key], key)
        stem = content[theirs]["warehouse_manager.weights.0"]
        assert torch.equal(network.warehouses["stem"].cells, stem.flatten(1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("{source}", "{config}", "{source}"), "expected the name of a new file"),
        (("{source}", "{config}", "{folder}"), "is a folder: expected the name of a file"),
        (("{source}", "{config}", "{config}/target.pth"), "is a file: expected a folder"),
        (("{source}", "configs/demo/resnet18.yaml", "{target}"), "missing"),
        (("{single}", "{config}", "{target}", "--weights", "ema"), "it holds model only"),
        (("none.pth", "{config}", "{target}"), "none.pth: no such file"),
        (("{source}", "none.yaml", "{target}"), "none.yaml: no such file"),
    ],
)
def test_mistakes_are_one_message(released_run, tool, capsys, tmp_path, arguments, expected):
    config, source, content = released_run
    before = source.read_bytes()
    names = {"source": source, "config": config, "folder": tmp_path}
    names |= {"target": tmp_path / "target.pth", "single": tmp_path / "single.pth"}
    torch.save(content["model"], names["single"])
    with pytest.raises(SystemExit, match="2"):
        tool("tools/convert_checkpoint.py", *(a.format(**names) for a in arguments))
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert not names["target"].exists()
    assert source.read_bytes() == before
