"""OpenVINO (``.xml``, ``.bin``) and ExecuTorch with XNNPACK (``.pte``): writing and running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import one_line
from .description import MARK, Description, ExportError
from .graph import quiet
from .onnx_file import needs


def write_openvino(graph: Path, description: Description, path: Path) -> Path:
    """Write an ONNX file as OpenVINO's, with the weights beside it in ``NAME.bin``; fp16 stores
    weights in 16 bits, and CPUs compute in float32 all the same."""
    openvino = needs("openvino")
    try:
        model = openvino.convert_model(graph)
    except MemoryError:
        raise
    except Exception as error:
        raise ExportError(f"{path}: OpenVINO cannot convert it: {one_line(error)}") from error
    model.set_rt_info(json.dumps(description.to_strings()), [MARK])
    openvino.save_model(model, path, compress_to_fp16=description.input.precision == "fp16")
    return path


def write_executorch(program: ExportedProgram, description: Description, path: Path) -> Path:
    """Write a traced network for ExecuTorch; XNNPACK takes the operators that it has."""
    needs("executorch")
    text = json.dumps(description.to_strings()).encode()
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower

            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods={MARK: torch.frombuffer(bytearray(text), dtype=torch.uint8)},
            )
            path.write_bytes(edge.to_executorch().buffer)
    except MemoryError:
        raise
    except Exception as error:
        raise ExportError(f"{path}: ExecuTorch cannot lower it: {one_line(error)}") from error
    return path


class OpenvinoNetwork(nn.Module):
    """An OpenVINO or ONNX file as a network: images ``[B, 3, H, W]`` -> logits ``[B, C]``.

    Args:
        path: ``NAME.xml`` with ``NAME.bin`` beside it, or ``NAME.onnx``, which OpenVINO reads too.

    Raises:
        ExportError: OpenVINO is missing or refuses the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        openvino = needs("openvino")
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 on processors that have it
        }
        try:
            model = openvino.Core().read_model(path)
            self.request = (
                openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
            )
        except Exception as error:
            raise ExportError(f"{path}: OpenVINO refuses it: {one_line(error)}") from error
        text = model.get_rt_info([MARK]).value if model.has_rt_info([MARK]) else "{}"
        self.metadata: dict[str, str] = _texts(text)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        found = self.request.infer({0: np.ascontiguousarray(images.float().numpy())})[0]
        return torch.from_numpy(found.copy())  # the request writes its next logits there


class ExecutorchNetwork(nn.Module):
    """A ``.pte`` file as a network: images ``[B, 3, H, W]`` -> logits ``[B, C]``.

    Args:
        path: the file. It is a program: read only files that you trust.

    Raises:
        ExportError: ExecuTorch is missing or refuses the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        needs("executorch")
        from executorch.runtime import Runtime

        try:
            # Methods need the program's memory.
            self.program = Runtime.get().load_program(path.read_bytes())
            self.method: Any = self.program.load_method("forward")
            text = "{}"
            if MARK in self.program.method_names:
                (codes,) = self.program.load_method(MARK).execute(())
                text = bytes(codes.tolist()).decode()
        except Exception as error:
            raise ExportError(f"{path}: ExecuTorch refuses it: {one_line(error)}") from error
        self.metadata = _texts(text)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        (found,) = self.method.execute((images.float().contiguous(),))
        return found.clone()  # the method writes its next logits there


RUNTIMES: dict[str, type[OpenvinoNetwork] | type[ExecutorchNetwork]] = {
    ".xml": OpenvinoNetwork,
    ".pte": ExecutorchNetwork,
}


def _texts(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
