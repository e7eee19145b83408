"""OpenVINO's files: agreement with PyTorch, what they hold, OpenVINO on our ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployment import CLASSES, SETTINGS, write_checkpoint

import kw
from kw.deploy import ExportError, export, read_source
from kw.deploy.export import Options
from kw.deploy.runtimes import OpenvinoNetwork

openvino = pytest.importorskip("openvino", reason="OpenVINO is an extra: '.[openvino]'")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_source(write_checkpoint(tmp_path_factory.mktemp("run") / "best.pth", SETTINGS))


@pytest.mark.parametrize("batch", [None, 2])
def test_files_are_read_back_with_their_description(
    source: Any, batch: int | None, tmp_path: Path
) -> None:
    written = export(source, tmp_path / "net.xml", Options(batch=batch, fixed_size=bool(batch)))
    assert {p.name for p in tmp_path.iterdir()} == {"net.xml", "net.bin", "net.xml.md"}
    classifier = kw.load(written.path)
    assert classifier.classes == CLASSES
    assert classifier.description.input.batch == batch
    for count in (1, 3) if batch is None else (batch,):
        images = torch.randn(count, 3, 40, 40 if batch else 57)
        expected = source.network.double()(images.double()).float()
        source.network.float()
        torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-4)


def test_openvino_reads_our_onnx_files(source: Any, tmp_path: Path) -> None:
    written = export(source, tmp_path / "net.onnx", Options())
    network, images = OpenvinoNetwork(written.path), torch.randn(3, 3, 40, 57)
    torch.testing.assert_close(network(images), source.network(images), rtol=1e-4, atol=1e-4)


def test_int8_is_calibrated_and_smaller(source: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 40), np.uint8)) for _ in range(8)]
    sizes = {}
    for precision in ("fp32", "int8"):
        options = Options(precision, 4, fixed_size=True)
        written = export(source, tmp_path / f"{precision}.xml", options, images)
        sizes[precision] = written.path.with_suffix(".bin").stat().st_size
        assert written.real is not None
        assert (written.real.largest > 1e-4) == (precision == "int8")
        assert written.real.largest < 0.3
    assert sizes["int8"] < sizes["fp32"]


def test_a_file_of_somebody_elses_is_refused(source: Any, tmp_path: Path) -> None:
    written = export(source, tmp_path / "net.xml", Options(fixed_size=True)).path
    model = openvino.Core().read_model(written)
    model.set_rt_info("", ["kernelwarehouse"])
    openvino.save_model(model, tmp_path / "other.xml")
    with pytest.raises(ExportError, match="holds no description of a classifier"):
        kw.load(tmp_path / "other.xml")
    written.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(ExportError, match="OpenVINO refuses it"):
        kw.load(written)
