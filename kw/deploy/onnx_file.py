"""ONNX files: written from a traced network, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import one_line
from ..version import __version__
from .description import Description, ExportError
from .graph import quiet

_EXTRAS = {"openvino": "openvino>=2025.1", "executorch": "executorch>=1.0"}


def needs(package: str) -> Any:
    """An optional package, or an ExportError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        kind, extra, name = "ONNX files need", "export", package
        if package in _EXTRAS:
            kind, extra, name = "such files need", package, _EXTRAS[package]
        raise ExportError(
            f"{kind} the package {name}: pip install 'kernelwarehouse[{extra}]' ({one_line(error)})"
        ) from error


def write_onnx(
    program: ExportedProgram, description: Description, path: Path, optimize: bool = True
) -> None:
    """Write a traced network as one file, with the description in its metadata, as
    :func:`write_program` does."""
    inputs = description.input
    open_axes = {0: "batch"} if inputs.batch is None else {}
    if inputs.least is not None:
        open_axes |= {2: "height", 3: "width"}
    # The names of the open axes; the program has their ranges.
    names: dict[str, Any] = {
        "input_names": ["images"],
        "output_names": ["logits"],
        "dynamic_shapes": {"images": open_axes},
    }
    write_program(program, description, path, optimize, names)


def write_program(
    program: ExportedProgram, description: Any, path: Path, optimize: bool, names: dict[str, Any]
) -> None:
    """Write a traced program, checked by ONNX's own checker.

    Args:
        program: of any network.
        description: stored in the file's metadata.
        path: the file.
        optimize: fold constants and rewrite the graph, by onnxscript.
        names: of inputs, outputs and open axes, as for ``torch.onnx.export``.

    Raises:
        ExportError: the graph has no counterpart in ONNX, or is larger than one file may be.
    """
    import onnx
    from google.protobuf.message import EncodeError

    try:
        with quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=optimize,
                **names,
            )
        assert written is not None
        model = written.model_proto
    except MemoryError:
        raise
    except Exception as error:
        raise ExportError(f"{path}: PyTorch cannot write it as ONNX: {one_line(error)}") from error
    _drop_traces(model)
    model.producer_name, model.producer_version = "kernelwarehouse", __version__
    add_description(model, description)
    try:
        content = model.SerializeToString()
        onnx.checker.check_model(content)
    except (EncodeError, ValueError) as error:
        raise ExportError(
            f"{path}: one ONNX file holds 2 GiB at most ({one_line(error)}); a classifier may be "
            "written with --precision fp16, as .pt2 or as .safetensors"
        ) from error
    path.write_bytes(content)


def add_description(model: Any, description: Any) -> None:
    """Put the description into a model's metadata, in place of any other."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, description.to_strings())


def _drop_traces(model: Any) -> None:
    """Remove where in the sources each node comes from: a quarter of a small file, and paths of
    the machine that wrote it."""
    for function in model.functions:
        del function.metadata_props[:]
    bodies = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        for node in body.node:
            del node.metadata_props[:]
            node.doc_string = ""
            bodies += [part.g for part in node.attribute if part.HasField("g")]
        for value in (*getattr(body, "value_info", ()), *getattr(body, "initializer", ())):
            del value.metadata_props[:]
            value.doc_string = ""


class OnnxNetwork(nn.Module):
    """An ONNX file as a network: images ``[B, 3, H, W]`` -> logits ``[B, C]``.

    Args:
        path: the file.
        device: ``"cpu"``; or ``"cuda"``, ``"cuda:N"`` with onnxruntime-gpu.

    Raises:
        ExportError: onnxruntime is missing, refuses the file, or has no such device.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        super().__init__()
        runtime = needs("onnxruntime")
        kind, _, number = device.partition(":")
        provider = f"{kind.upper()}ExecutionProvider"
        if kind not in ("cpu", "cuda") or provider not in runtime.get_available_providers():
            raise ExportError(
                f"{path}: onnxruntime has no {provider} here; install onnxruntime-gpu, or use cpu"
            )
        which = {"device_id": number} if number else {}
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(path, options, providers=[(provider, which)])
        except Exception as error:
            raise ExportError(f"{path}: onnxruntime refuses it: {one_line(error)}") from error
        if provider not in self.session.get_providers():
            # It computes on the CPU then, and logs why: microsoft/onnxruntime issue 23372.
            raise ExportError(
                f"{path}: onnxruntime cannot start its {provider}: the CUDA and cuDNN that it was "
                "built for are not found; install them, or use cpu"
            )
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, on the images' device."""
        inputs = {"images": images.float().cpu().numpy()}
        (logits,) = self.session.run(["logits"], inputs)
        return torch.from_numpy(logits).to(images.device)
