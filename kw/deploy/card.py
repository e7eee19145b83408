"""The model card: a page beside an exported file that says what it is and how to use it."""

from __future__ import annotations

import platform
from pathlib import Path

import timm
import torch

from ..config.schema import ModelConfig
from ..models.complexity import Complexity, analyze
from ..version import __version__
from .description import Description, InputRange, preprocessing
from .source import Source
from .verify import Difference

__all__ = ["write_card"]

_CITATION = """\
@inproceedings{li2024kernelwarehouse,
  title={KernelWarehouse: Rethinking the Design of Dynamic Convolution},
  author={Li, Chao and Yao, Anbang},
  booktitle={International Conference on Machine Learning},
  year={2024},
  note={arXiv:2406.07879}
}
@article{li2023kernelwarehouse,
  title={KernelWarehouse: Towards Parameter-Efficient Dynamic Convolution},
  author={Li, Chao and Yao, Anbang},
  journal={arXiv preprint arXiv:2308.08361},
  year={2023}
}"""
_LISTED = 20  # classes that are named one by one

_COMMANDS = {
    ".onnx": """\
import kw  # or onnxruntime alone: preprocessing and classes are in the file's metadata
classifier = kw.load("{name}")
classifier.predict(["image.jpg"], k=5)""",
    ".pt2": """\
import kw  # or torch.export.load("{name}").module()
classifier = kw.load("{name}")
classifier.predict(["image.jpg"], k=5)""",
    ".safetensors": """\
import kw
classifier = kw.load("{name}")  # compares the file with the hash in its name
classifier.predict(["image.jpg"], k=5)
network = classifier.network  # a torch.nn.Module""",
}


def write_card(
    path: Path, source: Source, inputs: InputRange, random: Difference, real: Difference | None
) -> Path:
    """Write ``<file>.md`` beside an exported file.

    Args:
        path: the file.
        source: the network that it was made of.
        inputs: what images the file takes.
        random: how the file differs from PyTorch on noise.
        real: the same on real images.

    Returns:
        The card.
    """
    card = path.with_name(path.name + ".md")
    description = source.description
    costs = analyze(description.config)
    lines = [
        f"# {description.model}",
        "",
        f"`{path.name}`, written by kernelwarehouse {__version__}.",
        "",
        "## Network",
        "",
        *_table(_network(description, costs)),
        "",
        "## Training and evaluation",
        "",
        *_table(_training(description, source.notes)),
        "",
        "## Input and output",
        "",
        *_table(_inputs(description, inputs)),
        "",
        "## Verification",
        "",
        *_verification(inputs, random, real),
        "",
        *_use(path),
        "## Licence, citation, versions",
        "",
        "Code: Apache-2.0. Weights carry the conditions of the images that they were trained on.",
        "",
        "```bibtex",
        _CITATION,
        "```",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}.",
    ]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return card


def _network(description: Description, costs: Complexity) -> list[tuple[str, str]]:
    model = description.config.model
    rows = [
        ("backbone (timm)", model.name),
        ("dynamic layers", _method(model)),
        ("parameters", f"{costs.params:,}"),
        ("multiply-adds of the static network", f"{costs.macs_static:,}"),
    ]
    if costs.macs_assembly:
        rows.append(("multiply-adds of assembling kernels", f"{costs.macs_assembly:,}"))
        rows.append(("multiply-adds of the attention", f"{costs.macs_attention:,}"))
    if costs.warehouses and model.kernel_warehouse is not None:
        cells = sum(warehouse.cells for warehouse in costs.warehouses)
        rows.append(("warehouses", f"{len(costs.warehouses)}, {cells} cells"))
    return rows


def _method(model: ModelConfig) -> str:
    if model.kernel_warehouse is not None:
        plan = model.kernel_warehouse.plan
        given = {key: value for key, value in model.kernel_warehouse.overrides().items() if value}
        settings = ", ".join(f"{key} {value}" for key, value in given.items())
        name = plan if isinstance(plan, str) else "of its own"
        return f"KernelWarehouse, plan {name}" + (f", {settings}" if settings else "")
    if model.peer is not None:
        settings = ", ".join(f"{key} {value}" for key, value in model.peer.settings().items())
        return f"{model.peer.method}, {settings}"
    return "none"


def _training(description: Description, notes: list[str]) -> list[tuple[str, str]]:
    config = description.config
    rows = [
        ("data", f"{Path(config.data.root).name}, {len(description.classes)} classes"),
        ("epochs trained", "unknown" if description.epoch is None else f"{description.epoch}"),
        ("weights", {"ema": "moving average"}.get(description.weights, "the model's own")),
    ]
    units = {"top1": "top-1, %", "top5": "top-5, %", "loss": "loss"}
    rows += [
        (f"{units[name]}, in the run's evaluation", f"{value:.4g}")
        for name, value in description.metrics.items()
        if name in units
    ]
    if not description.metrics:
        rows.append(("accuracy", "the checkpoint holds none; measure it: tools/test.py"))
    return rows + [("note", note) for note in notes]


def _inputs(description: Description, inputs: InputRange) -> list[tuple[str, str]]:
    steps = preprocessing(description.config.data)
    sides = (
        f"{inputs.size} x {inputs.size} only"
        if inputs.least is None
        else f"any from {inputs.least} x {inputs.least} on; evaluated at {inputs.size}"
    )
    names = description.classes[:_LISTED]
    more = len(description.classes) - len(names)
    listed = ", ".join(names) + (f" and {more} more (in the file)" if more else "")
    return [
        ("images", f"`images`, {steps['layout']}, {steps['colour']}"),
        ("batch", "any" if inputs.batch is None else f"{inputs.batch} only"),
        ("height, width", sides),
        ("EXIF orientation", steps["exif_orientation"]),
        ("resize the shorter side to", f"{steps['resize_shorter_side']}, {steps['interpolation']}"),
        ("centre crop", f"{steps['centre_crop']}"),
        ("then", f"(value / 255 - mean) / std; mean {steps['mean']}, std {steps['std']}"),
        ("output", f"`logits`, float32 [batch, {len(description.classes)}]; softmax for shares"),
        ("classes", listed),
        ("precision", inputs.precision),
        ("temperature", "0, folded"),
    ]


def _verification(inputs: InputRange, random: Difference, real: Difference | None) -> list[str]:
    lines = ["After writing, the file was run beside PyTorch in float32:", ""]
    for kind, found in (("random", random), ("real", real)):
        if found is None:
            lines.append(f"- {kind} images: none were given.")
            continue
        shapes = ", ".join("x".join(map(str, shape)) for shape in found.shapes)
        lines.append(
            f"- {kind} images ({shapes}): logits differ by {found.largest:.1e} of the largest; "
            f"{found.same} of {found.images} get the same class."
        )
    return lines


def _use(path: Path) -> list[str]:
    if path.suffix not in _COMMANDS:  # a format of somebody's own
        return []
    code = _COMMANDS[path.suffix].format(name=path.name)
    command = f"    python tools/predict.py {path.name} image.jpg folder/"
    return ["## Use", "", "```python", code, "```", "", command, ""]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
