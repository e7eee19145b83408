"""Binding operators to mmcv, finding packages, and the suppression of boxes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import detection_reference as reference
import numpy as np
import pytest
import torch
from detection_setup import DEVICES, operators
from torch import Tensor

from kw.detection.ops import Binding, bind, binding
from kw.detection.origins import installed_path, is_installed, packages_from_metadata


def random_boxes(n: int, seed: int = 0, size: float = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, generator=generator) * size - 5
    extents = torch.rand(n, 2, generator=generator) * size / 2 + 1
    return torch.cat([corners, corners + extents], 1), torch.rand(n, generator=generator)


# ---------------------------------------------------------------- binding


def test_binding_twice_changes_nothing() -> None:
    extension = sys.modules["mmcv._ext"]
    assert bind() is Binding.BOUND
    assert sys.modules["mmcv._ext"] is extension
    assert importlib.util.find_spec("mmcv._ext") is extension.__spec__
    assert extension.__spec__.loader.create_module(extension.__spec__) is extension


def test_missing_operators_fail_when_called_by_name() -> None:
    module = sys.modules["mmcv._ext"]
    with pytest.raises(NotImplementedError, match=r"'carafe_forward'.*install"):
        module.carafe_forward(torch.zeros(1), up_factor=2)
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = module.__wrapped__
    boxes, scores = random_boxes(3)
    rotated = torch.cat([boxes, torch.zeros(3, 1)], 1)
    with pytest.raises(NotImplementedError, match="'nms_rotated'"):
        operators.nms_rotated(rotated, scores, 0.5)


def test_mmengine_believes_in_the_operators() -> None:
    """Its optimizer constructor then knows the offsets of deformable convolutions."""
    from mmcv.utils import collect_env
    from mmengine.utils.dl_utils import mmcv_full_available

    assert mmcv_full_available()
    assert "torchvision" in collect_env()["MMCV Compiler"]


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of an mmcv and an mmdet, not bound yet."""
    for name in ("mmcv/ops", "mmdet"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mmcv/version.py").write_text("__version__ = '2.1.0'\n")
    (tmp_path / "mmcv/ops/nms.py").write_text("ext_module = load_ext('_ext', ['nms'])\n")
    (tmp_path / "mmdet/__init__.py").write_text(
        "mmcv_minimum_version = '2.0.0rc4'\nmmcv_maximum_version = '2.2.0'\n"
    )
    monkeypatch.setattr(binding, "_folder", lambda package: tmp_path / package)
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    return tmp_path


def test_plain_mmcv_is_bound(installation: Path) -> None:
    assert bind() is Binding.BOUND
    assert "mmcv._ext" in sys.modules


@pytest.mark.parametrize("file", ["_ext.py", f"_ext{EXTENSION_SUFFIXES[0]}"])
def test_compiled_mmcv_is_left_alone(installation: Path, file: str) -> None:
    (installation / "mmcv" / file).write_text("raise RuntimeError('loaded in vain')\n")
    assert bind() is Binding.COMPILED
    assert "mmcv._ext" not in sys.modules


def test_loaded_extension_is_left_alone(
    installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", loaded)
    assert bind() is Binding.COMPILED
    assert sys.modules["mmcv._ext"] is loaded


def test_operators_without_extension_are_left_alone(installation: Path) -> None:
    (installation / "mmcv/ops/nms.py").write_text("from torchvision.ops import nms\n")
    assert bind() is Binding.NOT_NEEDED
    assert "mmcv._ext" not in sys.modules


@pytest.mark.parametrize("version", ["1.7.2", "2.0.0rc3", "2.2.0", "2.3.1"])
def test_versions_that_do_not_go_together(installation: Path, version: str) -> None:
    (installation / "mmcv/version.py").write_text(f"__version__ = '{version}'\n")
    with pytest.raises(ImportError, match=rf"< 2\.2\.0, found {version}.*kernelwarehouse\[detect"):
        bind()


@pytest.mark.slow
def test_a_pair_that_does_not_go_together_stops_detectors_alone(installation: Path) -> None:
    for package in ("mmcv", "mmdet"):
        (installation / package / "__init__.py").touch()
    (installation / "mmcv/version.py").write_text("__version__ = '2.2.0'\n")
    program = """
from kw import detection
from kw.detection.annotations import load_annotations
print("annotations")
detection.load_detector_config
"""
    path = f"{installation}{os.pathsep}{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "annotations\n"
    assert "takes mmcv >= 2.0.0rc4, < 2.2.0, found 2.2.0" in done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs mmcv.*pip install 'kernelwarehouse\[detection\]'"
    ):
        bind()


@pytest.mark.slow
def test_an_import_that_failed_can_be_repeated() -> None:
    program = """
try:
    import mmcv.ops
except ModuleNotFoundError as error:
    assert error.name == "mmcv._ext", error
else:
    raise SystemExit("mmcv.ops needs no binding")
from kw.detection.ops import bind
bind()
import mmcv.ops, mmdet.models
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------- packages


@pytest.mark.parametrize("base", ["models/mask-rcnn_r50_fpn.py", "schedules/schedule_1x.py"])
def test_base_files_of_other_packages(tmp_path: Path, base: str) -> None:
    from mmengine import Config
    from mmengine.config import config as module

    before = module.is_installed
    file = tmp_path / "config.py"
    file.write_text(f"_base_ = 'mmdet::_base_/{base}'\n")
    with packages_from_metadata():
        config = Config.fromfile(str(file))
    assert module.is_installed is before
    assert len(config)


def test_packages_are_found_by_both_names() -> None:
    assert is_installed("mmdet")
    assert not is_installed("no-such-package")
    assert Path(installed_path("mmdet")).name == "mmdet"
    assert Path(installed_path("mmengine")).name == "mmengine"
    if is_installed("mmcv-lite"):
        assert Path(installed_path("mmcv-lite")).name == "mmcv"
    with pytest.raises(ModuleNotFoundError):
        installed_path("no-such-package")


# ---------------------------------------------------------------- suppression


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("device", DEVICES)
def test_nms(device: str, threshold: float, offset: int) -> None:
    boxes, scores = random_boxes(60)
    expected = reference.nms(boxes, scores, threshold, offset)
    dets, kept = operators.nms(boxes.to(device), scores.to(device), threshold, offset=offset)
    assert kept.tolist() == expected
    assert kept.device.type == device
    torch.testing.assert_close(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[expected])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_types(dtype: torch.dtype, device: str) -> None:
    boxes, scores = random_boxes(40, seed=1)
    boxes = boxes.to(device, dtype)
    expected = reference.nms(boxes, scores, 0.4, 0)
    _, kept = operators.nms(boxes, scores.to(device), 0.4)  # scores stay float32
    assert kept.tolist() == expected
    with torch.autocast(device, torch.bfloat16 if dtype == torch.float64 else dtype):
        assert operators.nms(boxes, scores.to(device), 0.4)[1].tolist() == expected


def test_nms_threshold_is_exceeded_in_float32() -> None:
    """The IoU of these is 0.6 as float32 rounds it, which is more than Python's 0.6."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    assert operators.nms(boxes, torch.tensor([0.9, 0.8]), 0.6)[1].tolist() == [0, 1]
    assert operators.nms(boxes, torch.tensor([0.9, 0.8]), 0.59)[1].tolist() == [0]


def test_nms_of_arrays_with_score_threshold_and_bound() -> None:
    boxes, scores = random_boxes(30)
    order = [i for i in reference.nms(boxes, scores, 0.5, 0) if scores[i] > 0.3][:4]
    _, kept = operators.nms(boxes.numpy(), scores.numpy(), 0.5, score_threshold=0.3, max_num=4)
    assert isinstance(kept, np.ndarray)
    assert kept.tolist() == order


@pytest.mark.parametrize("split", [10000, 5])
@pytest.mark.parametrize("kind", ["nms", "soft_nms"])
def test_batched_nms_keeps_classes_apart(kind: str, split: int) -> None:
    boxes, scores = random_boxes(40, seed=2)
    classes = torch.arange(40) % 3
    settings = {"type": kind, "iou_threshold": 0.3, "split_thr": split}
    dets, kept = operators.batched_nms(boxes, scores, classes, settings)
    values = {}
    for c in range(3):
        members = (classes == c).nonzero()[:, 0]
        if kind == "nms":
            indices = reference.nms(boxes[members], scores[members], 0.3, 0)
            new = scores[members][indices].tolist()
        else:
            indices, new = reference.soft_nms(
                boxes[members], scores[members], 0.3, 0.5, 1e-3, "linear", 0
            )
        values.update(zip(members[indices].tolist(), new, strict=True))
    assert sorted(kept.tolist()) == sorted(values)
    assert dets[:, 4].tolist() == pytest.approx([values[i] for i in kept.tolist()], abs=1e-5)
    assert (dets[:, 4].diff() <= 0).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("device", DEVICES)
def test_soft_nms(device: str, method: str, offset: int) -> None:
    boxes, scores = random_boxes(50, seed=3)
    expected, values = reference.soft_nms(boxes, scores, 0.3, 0.4, 0.05, method, offset)
    dets, kept = operators.soft_nms(
        boxes.to(device), scores.to(device), 0.3, 0.4, 0.05, method, offset
    )
    assert 1 < len(expected) < 50
    assert kept.tolist() == expected
    torch.testing.assert_close(dets[:, :4].cpu(), boxes[expected])
    torch.testing.assert_close(dets[:, 4].cpu(), torch.tensor(values), atol=1e-5, rtol=1e-5)


def test_soft_nms_takes_ties_as_documented() -> None:
    """mmcv's own example: equal scores, boxes without an area."""
    boxes = torch.tensor(
        [[4.0, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]]
    )
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0])
    for method in ("naive", "linear", "gaussian"):
        dets, kept = operators.soft_nms(boxes, scores, 0.6, method=method)
        assert kept.tolist() == [0, 1, 2, 3, 4]
        assert dets[:, 4].tolist() == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.4])
    dets, kept = operators.soft_nms(boxes[:1].bfloat16(), scores[:1].double() * 0)
    assert kept.tolist() == [0]  # the first box stays, whatever its score


def test_nms_match_groups() -> None:
    boxes, scores = random_boxes(40, seed=4)
    groups = [g.tolist() for g in operators.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)]
    assert sorted(i for group in groups for i in group) == list(range(40))
    heads = [g[0] for g in groups]
    assert heads == reference.nms(boxes, scores, 0.3, 0)
    for number, group in enumerate(groups):
        assert group == sorted(group, key=lambda i: -scores[i])
        for i in group[1:]:
            assert reference.iou(boxes[group[0]], boxes[i], 0) >= 0.3
            assert all(reference.iou(boxes[h], boxes[i], 0) < 0.3 for h in heads[:number])
    edge = torch.tensor([[0.0, 0, 10, 10, 0.9], [0, 0, 10, 5, 0.8]])
    assert [g.tolist() for g in operators.nms_match(edge, 0.5)] == [[0, 1]]


@pytest.mark.parametrize("device", DEVICES)
def test_no_boxes(device: str) -> None:
    boxes, scores = torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
    for operator in (operators.nms, operators.soft_nms):
        dets, kept = operator(boxes, scores, 0.5)
        assert dets.shape == (0, 5)
        assert kept.shape == (0,)
        assert kept.dtype == torch.int64
    assert operators.nms_match(torch.zeros(0, 5), 0.5) == []
