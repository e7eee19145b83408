"""Do all back ends train alike? Loss curves from one start, on the same batches.

Rounding differs between back ends, and training amplifies it: two curves drift apart although both
are right. How far is found by the yardstick of two right answers, ``grouped`` against
``reference``; a back end is sound if it stays as near.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..warehouse import KWLayer, convert, set_backend, set_temperature
from ..warehouse.ops import assembly_precision, check_backend, set_assembly_precision

__all__ = [
    "MODELS",
    "CurveSettings",
    "Deviation",
    "compare",
    "deviations",
    "force_where_possible",
    "loss_curve",
    "output_errors",
    "start",
]


MODELS = ("resnet18", "convnext")


@dataclass(frozen=True)
class CurveSettings:
    """The training run that is repeated with every back end.

    Attributes:
        steps: optimizer updates.
        batch: images an update.
        size: side of the images, pixels.
        classes: classes of the task.
        model: ``"resnet18"`` (an eighth of the channels) or ``"convnext"`` (a sixth of the
            channels, one block a stage), which has depthwise layers and LayerNorm in its attention.
        ratio: convolutional parameter budget b.
        lr: learning rate of SGD with momentum 0.9.
        seed: of weights and data.
    """

    steps: int = 200
    batch: int = 16
    size: int = 32
    classes: int = 10
    model: str = "resnet18"
    ratio: float = 1.0
    lr: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Deviation:
    """How far a loss curve is from the reference's, as a share of the loss that both start with.

    Attributes:
        first: after one update.
        mean: over all updates.
        worst: at the worst update.
        final: of the mean loss of the last tenth.
    """

    first: float
    mean: float
    worst: float
    final: float


def start(settings: CurveSettings) -> nn.Module:
    """The network before its first update: narrow, converted, halfway annealed.

    Raises:
        ValueError: an unknown model.
    """
    torch.manual_seed(settings.seed)
    if settings.model == "resnet18":
        network = timm.create_model(
            "resnet18", num_classes=settings.classes, channels=(8, 16, 32, 64)
        )
        plan = "resnet18"
    elif settings.model == "convnext":
        network = timm.create_model(
            "convnext_tiny",
            num_classes=settings.classes,
            depths=(1, 1, 1, 1),
            dims=(16, 32, 64, 128),
        )
        plan = "convnext_tiny"
    else:
        raise ValueError(f"model {settings.model!r} is unknown; known: {', '.join(MODELS)}")
    network = convert(network, plan, cell_num_ratio=settings.ratio, start="paper")
    set_temperature(network, 0.5)
    return network


def force_where_possible(
    network: nn.Module, backend: str, dtype: torch.dtype = torch.float32
) -> int:
    """Give a back end every layer that it can do in a type, the reference the others.

    Returns:
        The number of layers that it was given.
    """
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


def loss_curve(
    network: nn.Module,
    backend: str,
    settings: CurveSettings,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[float]:
    """Losses of a run from a copy of ``network`` with one back end.

    Args:
        network: the start; it is left as it is.
        backend: a name, or ``"auto"``; layers that it cannot do take the reference.
        settings: the run.
        dtype: of autocast; float32 for none, float64 converts the network.
        device: where to train.

    Returns:
        The loss before every update; empty if the back end can do none of the layers.
    """
    network = copy.deepcopy(network).to(device)
    exact = dtype == torch.float64
    if exact:
        network.double()
    if not force_where_possible(network, backend, dtype):
        return []
    optimizer = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9)
    losses = []
    for images, labels in _batches(settings):
        images = images.to(device, torch.float64 if exact else torch.float32)
        autocast = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(
            torch.device(device).type, dtype if autocast else None, enabled=autocast
        ):
            logits = network(images)
        loss = F.cross_entropy(logits if exact else logits.float(), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare(
    backends: Sequence[str],
    settings: CurveSettings,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Loss curves of the reference and of every back end that can do a layer, from one start."""
    network = start(settings)
    names = ["reference", *(name for name in backends if name != "reference")]
    curves = {name: loss_curve(network, name, settings, dtype, device) for name in names}
    return {name: curve for name, curve in curves.items() if curve}


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


def output_errors(
    settings: CurveSettings, device: str = "cpu", backend: str = "auto"
) -> dict[str, float]:
    """What precision costs: relative errors of a trained network's logits against float64.

    The network is trained for ``settings.steps`` updates first, at temperature 0, so that its
    coefficients are signed and spread as in use.

    Args:
        settings: network, data and training.
        device: where to compute.
        backend: of all layers.

    Returns:
        ``||y - y64|| / ||y64||`` by precision: ``"float32"``, ``"bfloat16"`` (autocast, kernels
        assembled in 16 bit) and ``"bfloat16, assembled in float32"``.
    """
    network = start(settings).to(device)
    set_temperature(network, 0.0)
    _train(network, settings, device)
    network.eval()
    images = next(_batches(replace(settings, seed=settings.seed + 1, batch=64)))[0].to(device)
    before = assembly_precision()
    with torch.no_grad():
        exact = copy.deepcopy(network).double()
        set_backend(exact, "grouped")
        truth = exact(images.double())
        set_backend(network, backend)
        outputs = {"float32": network(images)}
        try:
            for precision, name in (
                ("autocast", "bfloat16"),
                ("float32", "bfloat16, assembled in float32"),
            ):
                set_assembly_precision(precision)
                with torch.autocast(torch.device(device).type, torch.bfloat16):
                    outputs[name] = network(images)
        finally:
            set_assembly_precision(before)
    return {name: ((y - truth).norm() / truth.norm()).item() for name, y in outputs.items()}


def _train(network: nn.Module, settings: CurveSettings, device: str) -> None:
    optimizer = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9)
    for images, labels in _batches(settings):
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _batches(settings: CurveSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a class are one pattern under noise as strong as the pattern."""
    generator = torch.Generator().manual_seed(settings.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, 3, settings.size, settings.size, generator=generator)

    patterns = draw(settings.classes)
    for _ in range(settings.steps):
        labels = torch.randint(settings.classes, (settings.batch,), generator=generator)
        yield patterns[labels] + draw(settings.batch), labels
