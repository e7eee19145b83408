"""Trace a network to a graph of operators, for any number of images and any size where possible.

The temperature is set to 0 and folded first: the graph has neither temperature nor one-hot start.
Each dynamic layer takes the form that exports best (:mod:`kw.warehouse.ops.exported`).
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..config import ConfigError
from ..config.schema import ModelConfig
from ..errors import one_line
from ..models.build import check_network, in_channels
from ..torch_private import trace_errors
from ..warehouse import KWLayer, fold_temperature, ops
from ..warehouse.same import same_padding
from .description import Description, ExportError, InputRange

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FILE = "kernelwarehouse.json"
_EXAMPLES = 3  # images of the example: neither 0 nor 1, which tracing takes for constants


class Graph(nn.Module):
    """The network to be traced: float32 images in, float32 logits out, at any precision between.

    Args:
        network: in evaluation mode; it is copied.
        dtype: of weights and arithmetic; the attention stays in float32, as under autocast.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = fold_temperature(copy.deepcopy(network)).to(dtype)
        self.dtype = dtype
        for module in self.network.modules():
            if isinstance(module, KWLayer):
                module.attention.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype)).float()


def input_range(
    network: nn.Module, config: ModelConfig, size: int | tuple[int, int]
) -> tuple[InputRange, str]:
    """The images that a network takes, and why it takes one size only (empty if it takes others).

    A network with position embeddings for one size refuses others. The least size is the one at
    which the deepest feature map has two positions along each axis: a size of one would be traced
    as a constant.
    """
    reduction, channels = _reduction(network), in_channels(config)
    height, width = InputRange(size).sides
    inputs = InputRange(height if height == width else (height, width), channels=channels)
    try:
        check_network(network, config, (height + 2 * reduction, width + 2 * reduction))
    except ConfigError:
        return inputs, "its position embeddings belong to that size"
    least = _least(network, reduction, channels)
    if min(height, width) < least:
        return inputs, (
            f"its deepest feature map has one position there, and sizes can be open from {least} on"
        )
    open_inputs = replace(inputs, least=least)
    for sides in open_inputs.further_sides:
        try:
            check_network(network, config, sides)
        except ConfigError:
            return inputs, f"it refuses {sides[0]} x {sides[1]}"
    return open_inputs, ""


def trace(graph: nn.Module, inputs: InputRange, runtime: str = "") -> ExportedProgram:
    """The graph of a network on the CPU, with the open sizes of ``inputs``, for a runtime of
    :func:`kw.warehouse.ops.exported.exported_for`; an ExportError if PyTorch cannot trace it."""
    shapes: dict[int, Any] = {}
    sides = inputs.sides
    if inputs.batch is None:
        shapes[0] = Dim("batch", min=1)
    if inputs.least is not None:
        sides = (max(sides[0], 4 * inputs.least), max(sides[1], 4 * inputs.least))
        shapes |= {2: Dim("height", min=inputs.least), 3: Dim("width", min=inputs.least)}
    example = torch.zeros(inputs.batch or _EXAMPLES, inputs.channels, *sides)
    return traced(graph, (example,), {"images": shapes}, runtime, type(graph).__name__)


def traced(
    graph: nn.Module, example: tuple[Tensor, ...], shapes: Any, runtime: str, name: str
) -> ExportedProgram:
    """The graph of any network for inputs like ``example``, with open ``shapes`` as for
    ``torch.export``; messages call it ``name``, otherwise as :func:`trace`."""
    export = partial(torch.export.export, graph, example, dynamic_shapes=shapes)
    try:
        # timm's formula has a maximum a layer: tracing an EfficientNet took minutes.
        timms = patch("timm.layers.padding.get_same_padding", same_padding)
        with quiet(), ops.exported_for(runtime), timms:
            try:
                return export()
            except trace_errors():
                # Code compares sizes, and the result is not the same for all: checked at run time.
                return export(prefer_deferred_runtime_asserts_over_guards=True)
    except MemoryError:
        raise
    except Exception as error:
        raise ExportError(f"PyTorch cannot trace {name}: {one_line(error)}") from error


def save_graph(program: ExportedProgram, description: Description, path: Path) -> None:
    """Write a ``.pt2`` file."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of the sources, with paths of this machine
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(
            program, buffer, extra_files={_FILE: json.dumps(description.to_strings())}
        )
    path.write_bytes(buffer.getvalue())


def load_graph(path: Path) -> tuple[nn.Module, Description]:
    """Read a ``.pt2`` file. It is a program: read only files that you trust.

    Raises:
        ExportError: it cannot be read, or was not written here.
    """
    extra = {_FILE: ""}
    try:
        with quiet():
            program = torch.export.load(path, extra_files=extra)
            module = program.module()
        texts = json.loads(extra[_FILE] or "{}")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ExportError(f"{path}: cannot be read as a .pt2 file: {one_line(error)}") from error
    texts = texts if isinstance(texts, dict) else {}
    return module, Description.from_strings(texts, str(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Hide messages of PyTorch's exporters: progress, and deprecations in PyTorch itself."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@torch.no_grad()
def _least(network: nn.Module, reduction: int, channels: int) -> int:
    """The least size at which the deepest feature map has two positions: one more than the total
    stride where convolutions pad, twice the stride where they do not (ConvNeXt)."""
    features = getattr(copy.deepcopy(network).to("meta"), "forward_features", None)
    if features is None:
        return 2 * reduction
    try:
        deepest = features(torch.empty(1, channels, reduction + 1, reduction + 1, device="meta"))
    except Exception:  # any network's way to refuse a size
        return 2 * reduction
    is_map = isinstance(deepest, Tensor)  # some networks give several
    return reduction + 1 if is_map and min(deepest.shape[2:]) >= 2 else 2 * reduction


def _reduction(network: nn.Module) -> int:
    """Side of the image over side of the deepest feature map."""
    info = getattr(network, "feature_info", None)
    info = getattr(info, "info", info)
    found = [entry["reduction"] for entry in info or [] if isinstance(entry, dict)]
    return max([int(reduction) for reduction in found], default=32)
