"""Random mistakes in detectors' configurations, as ``tests/test_bad_input.py`` for classifiers.

A Python configuration is a program, so that texts are not damaged at random here: settings are.
Detectors are built, small ones; data are read; the first update is not made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import breadth
from coco_set import detector_text, write_coco_set
from mutations import MISSING, VALUES, Case, dump
from test_bad_input import SECONDS, Hangs, fault_of_message, same, time_limit

pytest.importorskip("mmdet", reason="the detection extra is not installed", exc_type=ImportError)

import kw.detection.run as detection_run
from kw.config.describe import key_hints
from kw.detection import load_detector_config
from kw.detection.config import DetectorConfig
from kw.detection.schema import DetectionConfig
from kw.errors import UserError
from kw.training.distributed import Process

ROOT = Path(__file__).parents[1]
SEED = 47
COUNTS = {"run": 60, "model": 40, "shipped": 60}
# Keys of what mmdetection reads, each with values that it may not like.
PARTS: dict[str, list[Any]] = {
    "model.type": ["FasterRCNN2", None, 3],
    "model.backbone.type": ["kw.Backbones", "ResNets", None],
    "model.backbone.network.name": ["resnet19", 3, "vgg11"],
    "model.backbone.network.timm_args": [{"channels": [8]}, {"unknown": 1}, {"in_chans": 1}],
    "model.backbone.network.kernel_warehouse": [{"plan": "vgg"}, {}, None, 3],
    "model.backbone.weights": ["none.pth", 3, ""],
    "model.backbone.out_indices": [[9], [], [3, 1], "a", [1, 2], [-1]],
    "model.backbone.frozen_stages": [9, -7, "a", None, 1.5],
    "model.backbone.norm_eval": ["a", 3, None],
    "model.backbone.drop_path_rate": [2.0, "a", -1],
    "model.backbone.unknown": [1],
    "model.neck.in_channels": [[1, 2], 3, "a", None, []],
    "model.neck.out_channels": [0, -1, "a", 32],
    "model.neck.num_outs": [0, 2, "a", -1],
    "model.neck.type": ["FPNN", None],
    "model.rpn_head.in_channels": [3, "a", -1],
    "model.rpn_head.feat_channels": [0, "a"],
    "model.rpn_head.unknown": [1],
    "model.rpn_head.anchor_generator.scales": [[], "a", [-1]],
    "model.rpn_head.anchor_generator.strides": [[4], [], 0, [4, 8, 16, 32, 64]],
    "model.roi_head.bbox_head.in_channels": [3, "a"],
    "model.roi_head.bbox_head.fc_out_channels": [0, -1, "a"],
    "model.roi_head.bbox_head.loss_cls": [{"type": "Nothing"}, None, 3],
    "model.roi_head.bbox_roi_extractor.roi_layer": [{"type": "x"}, None, 3],
    "model.roi_head.mask_head.num_convs": [-1, "a"],
    "model.train_cfg.rcnn": [None, 3, {}],
    "model.test_cfg.rcnn": [None, 3, {}],
    "model.data_preprocessor": [None, 3, {"type": "x"}, {"mean": "a"}],
    "model.data_preprocessor.mean": [[1], "a", None],
    "train_pipeline": [[], None, 3, "a", [3], [{}], [{"type": "Nothing"}], {"a": 1}],
    "test_pipeline": [[], None, 3, [{"type": 3}], [{"type": "LoadImageFromFile", "x": 1}]],
    "train_pipeline.0.type": ["Load", None, 3],
    "train_pipeline.2.prob": [3, "a", -1],
    "train_pipeline.9.prob": [0.5],
    "test_pipeline.1.scale": [[0, 0], "a", [-1, 5], 3, [96]],
    "test_pipeline.1.unknown": [3],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_coco_set(root)
    path = root / "detector.py"
    path.write_text(detector_text(root))
    return path


def attempt(case: Case, work_dir: Path, build: bool) -> tuple[str, str]:
    """As of ``test_bad_input``, up to the building of detector and data."""
    try:
        with time_limit(3 * SECONDS), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            config = load_detector_config(str(case.file), case.options)
            if build:
                detection_run.build_trainer(config, work_dir, Process(0, 1, torch.device("cpu")))
    except UserError as error:
        why = fault_of_message(str(error), case)
        # mmdetection's own words name a class, not a key.
        if why and case.key.split(".")[0] in ("model", "train_pipeline", "test_pipeline"):
            why = "" if str(error).startswith(("model", "train_pipeline", "test_pipel")) else why
        if why and case.key.startswith("data.") and isinstance(case.value, str):
            why = "" if case.value and case.value in str(error) else why  # a file's name
        return ("wrong", why) if why else ("refused", "")
    except Hangs:
        return "wrong", f"took more than {3 * SECONDS} s"
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {error}"
    if any(f" {case.key} = " in str(warning.message) for warning in told):
        return "accepted", ""
    found = found_in(config, case.key)
    is_same = same(_lists(found), case.value)
    return ("accepted", "") if is_same else ("wrong", f"{case.key} is {found!r}")


def found_in(config: DetectorConfig, key: str) -> Any:
    """What a resolved configuration has at a dotted key; places in lists are numbers."""
    tree: Any = dataclasses.asdict(config.run)
    for name in ("model", "train_pipeline", "test_pipeline"):
        tree[name] = getattr(config, name)
    for name in key.split("."):
        is_list = isinstance(tree, (list, tuple))
        tree = tree[int(name)] if is_list else tree.get(name, MISSING)
        if tree is MISSING or tree is None:
            return None  # a network's settings are resolved without those that say nothing
    return tree


def _lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return value


def option_case(file: Path, key: str, value: Any, fitting: list[str]) -> Case:
    options = [*fitting, f"{key}={dump(value)}"]
    return Case(f"{key} = {value!r:.60}", file, options, key, value)


def run_cases(file: Path, rng: random.Random, count: int, fitting: list[str]) -> Iterator[Case]:
    keys = [*key_hints(DetectionConfig), "epoch", "data.rot", "optimizer.lrr", "modell", "tune"]
    for _ in range(count):
        yield option_case(file, rng.choice(keys), rng.choice(VALUES), fitting)


def try_all(cases: Iterator[Case], work_dir: Path, build: bool) -> dict[str, int]:
    counts = {"refused": 0, "accepted": 0, "wrong": 0}
    faults = []
    for number, case in enumerate(cases):
        outcome, why = attempt(case, work_dir / str(number), build)
        counts[outcome] += 1
        if why:
            faults.append(f"{case.name} [{case.file.name}]: {why[:500]}")
    assert not faults, f"{len(faults)} of {sum(counts.values())}:\n" + "\n".join(faults)
    return counts


@pytest.mark.parametrize("part", breadth(range(3), [0]))
def test_settings_of_the_run(part: int, small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """On one detector, whose own settings are not in question here."""
    config = load_detector_config(str(small))
    detector = detection_run.build_detector(config.model, ["blue", "red", "green"])
    monkeypatch.setattr(detection_run, "build_detector", lambda model, classes: detector)
    cases = run_cases(small, random.Random(SEED + part), COUNTS["run"] // 3, [])
    assert try_all(cases, tmp_path, build=True)["refused"] > 8


@pytest.mark.parametrize("part", breadth(range(2), [0]))
def test_settings_of_the_model(part: int, small: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED + part)
    chosen = [rng.choice(list(PARTS)) for _ in range(COUNTS["model"] // 2)]
    cases = (option_case(small, key, rng.choice(PARTS[key]), []) for key in chosen)
    assert try_all(cases, tmp_path, build=True)["refused"] > 10


@pytest.mark.parametrize("part", breadth(range(3), [0]))
def test_shipped_ones(part: int, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    rng = random.Random(SEED + part)
    files = sorted((tmp_path / "configs" / "coco").glob("*.py"))
    cases = (
        next(run_cases(rng.choice(files), rng, 1, ["model.backbone.weights=null"]))
        for _ in range(COUNTS["shipped"] // 3)
    )
    assert try_all(cases, tmp_path, build=False)["refused"] > 8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "_base_ = 3",
        "_base_ = ['none.py']",
        "_base_ = ['detector.py']",
        "_base_ = ['mmdet::none.py']",
        "_base_ = ['no::none.py']",
        "_base_ = [1, None]",
        "model = ",
        "model = 3",
        "model = dict(type=3)\ntrain_pipeline = 3\ntest_pipeline = 3",
        "1 / 0",
        "import nothing_of_this_name",
        "raise SystemExit(3)",
        "raise KeyboardInterrupt",
        "exit(1)",
        "epochs: 3\n",
        "def f(): f()\nf()",
        "\x00",
        "é = 'ü'",
        "model = dict(backbone=dict(type='kw.Backbone'))",
        "model = dict(backbone=dict(type='kw.Backbone', network='none.yaml'))",
        "model = dict(backbone=dict(type='kw.Backbone', network=3))",
        "custom_imports = dict(imports=['nothing_of_this_name'])",
        "custom_imports = 3",
        "[" * 5000,
    ],
)
def test_programs(text: str, tmp_path: Path) -> None:
    path = tmp_path / "detector.py"
    path.write_text(text)
    interrupts = "KeyboardInterrupt" in text  # not the file's to raise, but an interruption is one
    expected = (UserError, KeyboardInterrupt) if interrupts else UserError
    with time_limit(SECONDS), contextlib.suppress(Warning), pytest.raises(expected) as error:
        load_detector_config(str(path))
    assert "Traceback" not in str(error.value)
