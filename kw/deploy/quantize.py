"""INT8 by onnxruntime: a scale per channel of weights and per activation, from real images.

Static convolutions and linear layers are quantized: weights, activations and arithmetic. Dynamic
layers are computed in float32; their matrices, cells and attention, are stored in 8 bits with a
scale per row. With products of 8 bits there as well, ResNet18 1x took 1.6 times as long as in
float32 (onnxruntime 1.32): assembled kernels cannot be arranged for them at loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import one_line
from ..warehouse import KWLayer
from .description import Description, ExportError
from .graph import quiet
from .onnx_file import add_description

CALIBRATION = 64
"""Images to calibrate on, at most."""

_BATCH = 4
_KINDS = ("Conv", "Gemm", "MatMul")


def quantize(
    path: Path,
    description: Description,
    images: Sequence[Tensor],
    network: nn.Module | None = None,
) -> None:
    """Quantize an ONNX file in place.

    Args:
        path: a float32 file.
        description: of the new file.
        images: normalised, ``[C, H, W]`` each; the ranges of activations are measured on them.
        network: the network that was traced, whose dynamic layers stay in float32; ``None``: the
            products with their matrices are quantized too.

    Raises:
        ExportError: onnxruntime cannot quantize it.
    """
    import onnx
    from onnxruntime import quantization as tool

    model = onnx.load(path)
    modules = () if network is None else network.named_modules()
    dynamic = tuple(f"{name}." for name, module in modules if isinstance(module, KWLayer))
    names = {tensor.name for tensor in model.graph.initializer}
    static = {name for name in names if not name.startswith(dynamic)}
    skipped = [
        node.name
        for node in model.graph.node
        if node.op_type in _KINDS and node.input[1] not in static
    ]
    target = path.with_name(f"{path.stem}-int8.onnx")
    batch = description.input.batch or min(_BATCH, len(images))
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
    for name in sorted(names - static):
        _store(name, quantized.graph)
    add_description(quantized, description)
    path.write_bytes(quantized.SerializeToString())


def _store(name: str, graph: Any) -> None:
    """Replace a float32 matrix by ``integers * scale``, which runtimes compute once, at loading."""
    from onnx import TensorProto, helper, numpy_helper

    (tensor,) = (each for each in graph.initializer if each.name == name)
    matrix = numpy_helper.to_array(tensor)
    if matrix.ndim != 2 or len(matrix) == 1:  # FDConv's row has coefficients of all magnitudes
        return
    scale = np.maximum(np.abs(matrix).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
    parts = {f"{name}_int8": np.rint(matrix / scale).astype(np.int8), f"{name}_scale": scale}
    graph.initializer.remove(tensor)
    graph.initializer.extend(numpy_helper.from_array(each, key) for key, each in parts.items())
    integers, scales = parts
    wide = f"{name}_wide"
    graph.node.insert(0, helper.make_node("Mul", [wide, scales], [name]))
    graph.node.insert(0, helper.make_node("Cast", [integers], [wide], to=TensorProto.FLOAT))


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
