"""INT8 by onnxruntime: a scale per channel of weights and per activation, from real images.

Only products with weights are quantized: convolutions, linear layers, and the product of
coefficients and cells, which has most of a KernelWarehouse network's parameters. The product of an
assembled kernel with its image has no weights and stays in float32, as do loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import one_line
from .description import Description, ExportError
from .graph import quiet
from .onnx_file import add_description

__all__ = ["CALIBRATION", "quantize"]

CALIBRATION = 64
"""Images to calibrate on, at most."""

_BATCH = 4
_KINDS = ("Conv", "Gemm", "MatMul")


def quantize(path: Path, description: Description, images: Sequence[Tensor]) -> None:
    """Quantize a float32 ONNX file in place; the ranges of activations are measured on normalised
    images ``[C, H, W]``.

    Raises:
        ExportError: onnxruntime cannot quantize it.
    """
    import onnx
    from onnxruntime import quantization as tool

    model = onnx.load(path)
    skipped = [
        node.name
        for node in model.graph.node
        if node.op_type in _KINDS and not _has_weights(node, model.graph)
    ]
    target = path.with_name(f"{path.stem}-int8.onnx")
    batch = description.input.batch or _BATCH
    try:
        with quiet():
            tool.quantize_static(
                model,
                target,
                _reader(tool.CalibrationDataReader, images[:CALIBRATION], batch),
                quant_format=tool.QuantFormat.QDQ,
                op_types_to_quantize=list(_KINDS),
                nodes_to_exclude=skipped,
                per_channel=True,
                # 7 bits: processors without VNNI add two products of 8 bits in 16, which overflow.
                reduce_range=True,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
            )
        quantized = onnx.load(target)
    except MemoryError:
        raise
    except Exception as error:
        raise ExportError(f"{path}: onnxruntime cannot quantize it: {one_line(error)}") from error
    finally:
        target.unlink(missing_ok=True)
    add_description(quantized, description)
    path.write_bytes(quantized.SerializeToString())


def _has_weights(node: Any, graph: Any) -> bool:
    constants = {tensor.name for tensor in graph.initializer}
    return any(name in constants for name in node.input[:2])


def _reader(base: type, images: Sequence[Tensor], batch: int) -> Any:
    """The images as onnxruntime asks for them: one batch a call, then ``None``."""

    class Reader(base):
        def __init__(self) -> None:
            self._batches: Iterator[dict[str, np.ndarray]] = (
                {"images": torch.stack(list(images[start : start + batch])).numpy()}
                for start in range(0, len(images) - batch + 1, batch)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    return Reader()
