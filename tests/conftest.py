"""Small data sets and configurations that tests share."""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kw.cli import main
from kw.config import config_from_mapping

# Choices of back ends are those of a machine that nobody has measured.
os.environ["KW_CALIBRATION"] = "0"
# The networks of tests are tiny: threads would only wait for one another.
torch.set_num_threads(1)
# A base of mmdetection is looked for in a hundred YAML files, half a second every time. What is
# kept is what they hold: the search itself ends in an exception for most bases.
try:
    from mmengine.config import utils as mmengine_utils
except ImportError:
    pass
else:
    mmengine_utils.load = functools.cache(mmengine_utils.load)
# Autograd starts its threads at the first backward pass: none here, but some where that one is
# inside torch.compile, and then processes that tests fork cannot run one (tests/processes.py).
torch.ones(1, requires_grad=True).sum().backward()

# What is imported stays: nothing of it is garbage, and a full collection looks through all of it.
gc.disable()

CLASSES = ("bird", "cat", "dog", "fish")
# ResNet18 with one block a stage: its plan finds a warehouse for every stage all the same.
SMALL = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first: several processes then end together."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def tried_once(check: Callable[..., None]) -> Callable[..., None]:
    """``check_network``, which takes as long as two updates, for each network until it passes."""
    passed: set[tuple[str, ...]] = set()

    @functools.wraps(check)
    def tried(network: nn.Module, config: Any, input_size: Any) -> None:
        key = repr(network), repr(config), str(input_size)
        if key not in passed:
            check(network, config, input_size)
            passed.add(key)

    return tried


def pytest_collection_finish() -> None:
    """Collections of garbage in tests leave the million objects of the imports out."""
    if build := sys.modules.get("kw.models.build"):
        check, once = build.check_network, tried_once(build.check_network)
        for names in [getattr(module, "__dict__", {}) for module in sys.modules.values()]:
            if names.get("check_network") is check:
                names["check_network"] = once
    gc.freeze()
    gc.set_threshold(3_000)  # of Python's 700
    gc.enable()


imported = len(sys.modules)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Those of what a test has imported, too: mmengine collects for every set that it reads."""
    global imported
    if len(sys.modules) != imported:
        imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    """The process ends with nothing left."""
    gc.unfreeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker of xdist that has reported ends at once: taking its imports apart takes seconds."""
    if hasattr(config, "workerinput"):
        os._exit(0)


@pytest.fixture(autouse=True)
def no_log_is_left() -> Iterator[None]:
    """Of a run that was built and not trained."""
    yield
    if "kw.training.logs" in sys.modules:
        sys.modules["kw.training.logs"].close_log()


def write_images(root: Path, split: str, counts: tuple[int, ...], seed: int) -> None:
    """Noise around a level of grey that tells the class."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(40 + 55 * label, 12, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of four classes: 64 training images and an odd number, 19, to validate."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", (16, 16, 16, 16), seed=0)
    write_images(root, "val", (5, 5, 5, 4), seed=1)
    return root


@pytest.fixture(scope="session")
def one_epoch(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float | None]]:
    """A run of ``settings`` with one epoch, and its figures; tests go on in copies of it."""
    from kw.training import train

    folder = tmp_path_factory.mktemp("one_epoch") / "run"
    return folder, train(config_from_mapping({**settings_of(images), "epochs": 1}), folder)


@pytest.fixture
def begun(one_epoch: tuple[Path, Any], tmp_path: Path) -> Path:
    """``tmp_path``, a copy of that run."""
    return Path(shutil.copytree(one_epoch[0], tmp_path, dirs_exist_ok=True))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a tool in this process, which saves the seconds of its imports."""
    root = Path(__file__).parents[1]

    def run(*arguments: object) -> None:
        monkeypatch.chdir(root)
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", words)
        if words[0].startswith("kw "):
            main([*words[0].split()[1:], *words[1:]])
        else:
            runpy.run_path(str(root / words[0]), run_name="__main__")

    return run


@pytest.fixture
def tested(tool: Callable[..., None], tmp_path: Path) -> Callable[..., Any]:
    """``kw test ARGUMENTS...``, and its results."""

    def results(*arguments: object) -> Any:
        file = tmp_path / "results.json"
        tool("kw test", *arguments, "--json", file)
        return json.loads(file.read_text())

    return results


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A stand-in that huggingface_hub takes for the hub (a ``Hub``), and a cache of its own."""
    from hub_server import TOKEN, running_hub
    from huggingface_hub import constants, file_download

    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):  # earlier versions read it from the second
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def settings(images: Path) -> dict[str, Any]:
    return settings_of(images)


def settings_of(images: Path) -> dict[str, Any]:
    """A run of seconds: a small ResNet without BatchNorm, converted, two epochs of four updates.

    Without BatchNorm an update does not depend on how its images are dealt out.
    """
    return {
        "model": {
            "name": "resnet18",
            "num_classes": 4,
            "timm_args": {**SMALL, "norm_layer": "groupnorm1"},
            "kernel_warehouse": {"plan": "resnet18", "norm": "layer", "start": "paper"},
        },
        "data": {"root": str(images), "input_size": 32, "workers": 0},
        "optimizer": {"name": "adamw", "lr": 0.002, "weight_decay": 0.05},
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "temperature_epochs": 1,
        "epochs": 2,
        "total_batch_size": 16,
        "batch_size": 16,
        "log_interval": 1,
    }
