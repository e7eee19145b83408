"""ExecuTorch's files: agreement with PyTorch, what they hold, which shapes they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deployment import CLASSES, SETTINGS, write_checkpoint

import kw
from kw.deploy import ExportError, export, read_source
from kw.deploy.export import Options
from kw.warehouse import KWConv2d, fold_temperature
from kw.warehouse.ops import exported_for

pytest.importorskip("executorch", reason="ExecuTorch is an extra: '.[executorch]'")


@pytest.mark.parametrize("batch", [None, 2])
def test_a_file_is_read_back_with_its_description(batch: int | None, tmp_path: Path) -> None:
    source = read_source(write_checkpoint(tmp_path / "best.pth", SETTINGS))
    written = export(source, tmp_path / "net.pte", Options(batch=batch))
    assert "files have one shape" in " ".join(written.notes)
    classifier = kw.load(written.path)
    assert classifier.classes == CLASSES
    images = torch.randn(batch or 1, 3, 40, 40)
    first = classifier(images)
    torch.testing.assert_close(first, source.network(images), rtol=1e-4, atol=1e-4)
    assert not torch.equal(classifier(images.flip(3)), first)  # and the first are kept
    torch.testing.assert_close(first, source.network(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the file takes"):
        classifier(torch.randn(3, 3, 40, 40))
    three = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    assert classifier.logits(three).shape == (3, 4)  # in parts, the last one filled up


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pte").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="ExecuTorch refuses it"):
        kw.load(tmp_path / "net.pte")


def test_xnnpack_computes_dynamic_layers() -> None:
    """What it leaves are sums over cells, from tensors of a few hundred values."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    layers = (
        KWConv2d(8, 16, 3, padding=1, start="paper"),
        KWConv2d(16, 16, 3, 2, padding=1, start="paper"),
        KWConv2d(16, 16, 3, 2, padding=1, groups=16, start="paper"),
        KWConv2d(16, 8, 1, start="paper"),
    )
    network = fold_temperature(torch.nn.Sequential(*layers).eval().requires_grad_(False))
    with exported_for("executorch"):
        program = torch.export.export(network, (torch.randn(1, 8, 10, 9),))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    nodes = edge.exported_program().graph.nodes
    names = {getattr(node.target, "__name__", "") for node in nodes if node.op == "call_function"}
    assert names <= {"executorch_call_delegate", "getitem", "aten.sum.dim_IntList"}
