#!/usr/bin/env python
"""Train with every back end from one start on the same batches, and compare the loss curves.

python scripts/compare_backends.py --steps 200 --dtype float32 bfloat16 --json curves.json

Rounding differs between back ends, and training amplifies it: two curves drift apart although both
are right. Read each back end's distance from the reference beside that of ``grouped``, which is
ordinary code: a back end is right if it stays as near.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kw.benchmark.cases import check_backends
from kw.benchmark.conditions import DTYPES
from kw.cli import ToolParser, number, output_file, run_tool
from kw.cli.tool import device, precision, save_json
from kw.evaluation import render_table
from kw.warehouse import KWLayer, convert, set_backend, set_temperature
from kw.warehouse.ops import (
    BACKENDS,
    assembly_precision,
    check_backend,
    set_assembly_precision,
)

MODELS = {
    "resnet18": ("resnet18", {"channels": (8, 16, 32, 64)}),
    # It has depthwise layers, and LayerNorm in its attention.
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)}),
}
"""timm's network, which is also the plan, and what makes it small."""


class CurveSettings(NamedTuple):
    """The training run that is repeated with every back end."""

    steps: int = 200  # optimizer updates
    batch: int = 16  # images an update
    size: int = 32  # side of the images, pixels
    classes: int = 10
    model: str = "resnet18"  # a key of MODELS
    ratio: float = 1.0  # convolutional parameter budget b
    lr: float = 0.02  # of SGD with momentum 0.9
    seed: int = 0  # of weights and data


class Deviation(NamedTuple):
    """How far a loss curve is from the reference's, as a share of the loss that both start with:
    after one update, over all, at the worst, and of the mean loss of the last tenth."""

    first: float
    mean: float
    worst: float
    final: float


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--backends", nargs="+", default=[*BACKENDS, "auto"], metavar="NAME")
    parser.add_argument(
        "--precision",
        "--dtype",
        dest="dtype",
        nargs="+",
        type=precision,
        choices=(*DTYPES, "float64"),
        default=["float32", "bfloat16"],
    )
    parser.add_argument("--steps", type=number(int, 1), default=200, help="optimizer updates")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write curves and distances"
    )
    args = parser.parse_args()
    check_backends(args.backends)

    report: list[dict[str, Any]] = []
    for model in args.models:
        settings = CurveSettings(steps=args.steps, model=model)
        for dtype in args.dtype:
            curves = compare(args.backends, settings, getattr(torch, dtype), args.device)
            found = deviations(curves)
            reference = curves["reference"]
            print(
                f"{model}, {dtype}, {args.device}: reference loss {reference[0]:.4f} -> "
                f"{sum(reference[-10:]) / len(reference[-10:]):.4f}"
            )
            header = ("back end", "after 1 update", "mean", "worst", "last tenth")
            rows = [(name, *(f"{v:.1e}" for v in d)) for name, d in found.items()]
            print(render_table(header, rows), flush=True)
            entry = {"settings": settings._asdict(), "dtype": dtype, "device": args.device}
            entry |= {"curves": curves, "deviations": {k: d._asdict() for k, d in found.items()}}
            report.append(entry)
        errors = output_errors(settings, args.device)
        print(f"{model}, logits after training, relative error against float64:")
        print(render_table(("precision", "error"), [(k, f"{v:.1e}") for k, v in errors.items()]))
        report.append({"model": model, "device": args.device, "output_errors": errors})
    if args.json is not None:
        save_json(report, args.json)


def start(settings: CurveSettings) -> nn.Module:
    """The network before its first update: narrow, converted, halfway annealed."""
    torch.manual_seed(settings.seed)
    name, sizes = MODELS[settings.model]
    network = timm.create_model(name, num_classes=settings.classes, **sizes)
    network = convert(network, name, cell_num_ratio=settings.ratio, start="paper")
    set_temperature(network, 0.5)
    return network


def force_where_possible(
    network: nn.Module, backend: str, dtype: torch.dtype = torch.float32
) -> int:
    """Give a back end every layer that it can do in a type, the reference the others; how many."""
    given = 0
    for layer in network.modules():
        if isinstance(layer, KWLayer):
            cells = layer.warehouse.cells.detach().to(dtype)
            try:
                if backend != "auto":
                    check_backend(backend, layer.spec, cells)
                layer.backend = backend
                given += 1
            except ValueError:
                layer.backend = "reference"
    return given


def compare(
    backends: Sequence[str],
    settings: CurveSettings,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Loss curves of the reference and of every back end that can do a layer, from one start.

    Layers that a back end cannot do take the reference. float64 converts the network, 16-bit types
    are autocast's.
    """
    network = start(settings)
    curves = {}
    for name in dict.fromkeys(["reference", *backends]):
        own = copy.deepcopy(network).to(device)
        if dtype == torch.float64:
            own.double()
        if force_where_possible(own, name, dtype):
            curves[name] = train(own, settings, dtype, device)
    return curves


def train(
    network: nn.Module, settings: CurveSettings, dtype: torch.dtype, device: str
) -> list[float]:
    """Train a network in place; the loss before every update."""
    optimizer = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9)
    kind, autocast = torch.device(device).type, dtype in (torch.bfloat16, torch.float16)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    losses = []
    for images, labels in batches(settings):
        with torch.autocast(kind, dtype if autocast else None, enabled=autocast):
            logits = network(images.to(device, exact))
        loss = F.cross_entropy(logits.to(exact), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def deviations(curves: dict[str, list[float]]) -> dict[str, Deviation]:
    """Every curve's distance from ``curves["reference"]``."""
    reference = torch.tensor(curves["reference"], dtype=torch.float64)
    tail = max(len(reference) // 10, 1)
    found = {}
    for name, curve in curves.items():
        if name == "reference":
            continue
        losses = torch.tensor(curve, dtype=torch.float64)
        relative = (losses - reference).abs() / reference[0]
        final = (losses[-tail:].mean() - reference[-tail:].mean()).abs() / reference[0]
        second = relative[min(1, len(relative) - 1)]  # the first loss precedes all updates
        found[name] = Deviation(
            second.item(), relative.mean().item(), relative.max().item(), final.item()
        )
    return found


def output_errors(settings: CurveSettings, device: str = "cpu") -> dict[str, float]:
    """What precision costs: relative errors of a trained network's logits against float64.

    The network is trained for ``settings.steps`` updates first, at temperature 0, so that its
    coefficients are signed and spread as in use.

    Returns:
        ``||y - y64|| / ||y64||`` by precision: ``"float32"``, ``"bfloat16"`` (autocast, kernels
        assembled in 16 bit) and ``"bfloat16, assembled in float32"``.
    """
    network = start(settings).to(device)
    set_temperature(network, 0.0)
    train(network, settings, torch.float32, device)
    network.eval()
    images = next(batches(settings._replace(seed=settings.seed + 1, batch=64)))[0].to(device)
    before = assembly_precision()
    with torch.no_grad():
        exact = copy.deepcopy(network).double()
        set_backend(exact, "grouped")
        truth = exact(images.double())
        set_backend(network, "auto")
        outputs = {"float32": network(images)}
        try:
            for kind, name in (
                ("autocast", "bfloat16"),
                ("float32", "bfloat16, assembled in float32"),
            ):
                set_assembly_precision(kind)
                with torch.autocast(torch.device(device).type, torch.bfloat16):
                    outputs[name] = network(images)
        finally:
            set_assembly_precision(before)
    return {name: ((y - truth).norm() / truth.norm()).item() for name, y in outputs.items()}


def batches(settings: CurveSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a class are one pattern under noise as strong as the pattern."""
    generator = torch.Generator().manual_seed(settings.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, 3, settings.size, settings.size, generator=generator)

    patterns = draw(settings.classes)
    for _ in range(settings.steps):
        labels = torch.randint(settings.classes, (settings.batch,), generator=generator)
        yield patterns[labels] + draw(settings.batch), labels


if __name__ == "__main__":
    run_tool(main)
