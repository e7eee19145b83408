"""The model card: a page beside an exported file, or of a repository, on a network and its use."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import timm
import torch

from ..config.schema import ModelConfig
from ..models.complexity import analyze
from ..version import __version__
from .description import Description, InputRange, preprocessing
from .source import Source
from .verify import Difference

_END = f"""\
## Licence, citation, versions

Code: Apache-2.0. Weights carry the conditions of the images that they were trained on.

```bibtex
@inproceedings{{li2024kernelwarehouse,
  title={{KernelWarehouse: Rethinking the Design of Dynamic Convolution}},
  author={{Li, Chao and Yao, Anbang}},
  booktitle={{International Conference on Machine Learning}},
  year={{2024}},
  note={{arXiv:2406.07879}}
}}
@article{{li2023kernelwarehouse,
  title={{KernelWarehouse: Towards Parameter-Efficient Dynamic Convolution}},
  author={{Li, Chao and Yao, Anbang}},
  journal={{arXiv preprint arXiv:2308.08361}},
  year={{2023}}
}}
```

Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}.
"""
_LISTED = 20  # classes that are named one by one
_USE = """\
```python
import kw

classifier = kw.load("{name}")
classifier.predict(["image.jpg"], k=5)
```

    kw predict {name} image.jpg folder/

{other}"""
_OTHER = {
    ".onnx": "onnxruntime alone runs it too; preprocessing and classes are in its metadata.",
    ".xml": "OpenVINO alone runs it too; the `.bin` beside it has the weights.",
    ".pte": "ExecuTorch's runtimes run it alone (method `forward`).",
    ".pt2": "`torch.export.load` reads the network alone.",
    ".safetensors": "`classifier.network` is a `torch.nn.Module`. `kw.load` compares the file with "
    "the hash in its name.",
}


def write_card(
    path: Path, source: Source, inputs: InputRange, random: Difference, real: Difference | None
) -> Path:
    """Write ``<file>.md`` beside an exported file, and return it; ``random`` and ``real`` say how
    the file differs from PyTorch on noise and on real images."""
    other = _OTHER.get(path.suffix)  # None: a registered format, which kw.load does not read
    use = _USE.format(name=path.name, other=other) if other else ""
    target = path.with_name(path.name + ".md")
    text = card(source.description.model, path.name, source, inputs, random, real, use)
    target.write_text(text, encoding="utf-8")
    return target


def card(
    title: str,
    file: str,
    source: Source,
    inputs: InputRange,
    random: Difference,
    real: Difference | None,
    use: str,
) -> str:
    """The text of a card; ``use`` is its section on how to use the file, the others are as for
    :func:`write_card`."""
    description = source.description
    agreement = f"{_agreement('random', random)}\n{_agreement('real', real)}"
    sections = {
        "Network": table(_network(description)),
        "Training and evaluation": table(_training(description, source.notes)),
        "Input and output": table(_inputs(description, inputs)),
        "Verification": "After writing, the file was run beside PyTorch in float32:\n\n"
        + agreement,
        "Use": use,
    }
    return page(title, file, sections)


def page(title: str, file: str, sections: Mapping[str, str]) -> str:
    """A card of these sections, the empty ones left out; licence, citation and versions follow."""
    parts = [f"# {title}", f"`{file}`, written by kernelwarehouse {__version__}."]
    parts += [f"## {name}\n\n{text}" for name, text in sections.items() if text]
    return "\n\n".join([*parts, _END])


def _network(description: Description) -> dict[str, object]:
    model, costs = description.config.model, analyze(description.config)
    rows: dict[str, object] = {
        "backbone (timm)": model.name,
        "dynamic layers": _method(model),
        "parameters": f"{costs.params:,}",
        "multiply-adds of the static network": f"{costs.macs_static:,}",
    }
    if costs.macs_assembly:
        rows["multiply-adds of assembling kernels"] = f"{costs.macs_assembly:,}"
        rows["multiply-adds of the attention"] = f"{costs.macs_attention:,}"
    if costs.warehouses and model.kernel_warehouse is not None:
        cells = sum(warehouse.cells for warehouse in costs.warehouses)
        rows["warehouses"] = f"{len(costs.warehouses)}, {cells} cells"
    return rows


def _method(model: ModelConfig) -> str:
    if model.kernel_warehouse is not None:
        plan = model.kernel_warehouse.plan
        name = f"KernelWarehouse, plan {plan if isinstance(plan, str) else 'of its own'}"
        settings = {key: v for key, v in model.kernel_warehouse.overrides().items() if v}
    elif model.peer is not None:
        name, settings = model.peer.method, model.peer.settings()
    else:
        return "none"
    return ", ".join([name, *(f"{key} {value}" for key, value in settings.items())])


def _training(description: Description, notes: list[str]) -> dict[str, object]:
    known = "unknown" if description.epoch is None else description.epoch
    rows: dict[str, object] = {
        "data": f"{Path(description.config.data.root).name}, {len(description.classes)} classes",
        "epochs trained": f"{known} of {description.config.epochs}",
        "weights": "moving average" if description.weights == "ema" else "the model's own",
    }
    units = {"top1": "top-1, %", "top5": "top-5, %", "mAP": "mAP, %", "f1": "F1, %", "loss": "loss"}
    for name, unit in units.items():
        if name in description.metrics:
            rows[f"{unit}, in the run's evaluation"] = f"{description.metrics[name]:.4g}"
    if not description.metrics:
        rows["accuracy"] = "the checkpoint holds none; measure it: kw test"
    return rows | ({"notes": "; ".join(notes)} if notes else {})


def _inputs(description: Description, inputs: InputRange) -> dict[str, object]:
    classes = description.classes
    more = len(classes) - _LISTED
    shares = "softmax for shares"
    if description.config.several_classes:
        shares = "sigmoid for the probability of each class"
    return {
        **{key.replace("_", " "): v for key, v in preprocessing(description.config.data).items()},
        "batch": "any" if inputs.batch is None else f"{inputs.batch} only",
        "image height, width": f"{inputs.words} only"
        if inputs.least is None
        else f"any from {inputs.least} x {inputs.least} on; evaluated at {inputs.words}",
        "output": f"`logits`, float32 [batch, {len(classes)}]; {shares}",
        "classes": ", ".join(classes[:_LISTED]) + (f", {more} more (in the file)" * (more > 0)),
        "precision": inputs.precision,
        "temperature": "0, folded",
    }


def _agreement(kind: str, found: Difference | None) -> str:
    if found is None:
        return f"- {kind} images: none were given."
    shapes = ", ".join("x".join(map(str, shape)) for shape in found.shapes)
    return (
        f"- {kind} images ({shapes}): logits differ by {found.largest:.1e} of the largest; "
        f"{found.same} of {found.images} get the same class."
    )


def table(rows: dict[str, object]) -> str:
    """A table of two columns without a head, in Markdown."""
    texts = {name: str(value).replace("|", "\\|") for name, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {t} |" for name, t in texts.items())])
