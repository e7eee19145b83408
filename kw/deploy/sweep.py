"""Whether configurations export: with random weights, since the path is what is tried."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import load_config
from ..config.schema import Config
from ..errors import UserError
from ..models.build import build_network
from ..version import __version__
from .description import Description, InputRange
from .export import Options, export
from .source import Source, ready

__all__ = ["random_source", "randomise", "try_export"]


def randomise(network: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Weights of which every part of the network shows in the logits, in place.

    Fresh networks hide mistakes: timm begins with residual branches that are multiplied by 0 or
    1e-6, and biases of 0. The statistics of BatchNorm2d are then those of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(noise - 0.5 if name.endswith("bias") else noise + 0.5)
            elif ".attention." in name:
                # Fresh ones tip over at a rounding error, layer after layer: why peers begin at
                # temperature 30.
                parameter.mul_(0.1)
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        network.train()
        # Attention branches divide by the size of their input and not by its spread: pooled noise
        # hardly varies, and what is divided by that magnifies rounding.
        branches = [m.eval() for m in network.modules() if isinstance(m, nn.BatchNorm1d)]
        hooks = [norm.register_forward_pre_hook(_take_size) for norm in branches]
        network(images)
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return network


def _take_size(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    norm.running_var.copy_(inputs[0].square().mean(0))  # type: ignore[operator]


def random_source(config: Config, name: str) -> Source:
    """A configuration's network with weights of :func:`randomise`."""
    torch.manual_seed(0)
    size = config.data.input_size
    network = randomise(build_network(config.model), torch.randn(8, 3, size, size))
    description = Description(
        model=name,
        classes=[str(label) for label in range(config.model.num_classes)],
        config=config,
        weights="model",
        epoch=0,
        metrics={},
        input=InputRange(size),
        versions={"kernelwarehouse": __version__, "torch": str(torch.__version__)},
    )
    return Source(ready(network), description, [])


def try_export(path: str, formats: list[str], options: list[str]) -> list[dict[str, Any]]:
    """Export a configuration in every format, into a folder that is removed.

    Returns:
        A row a format: ``config``, ``model``, ``format``, ``difference``, ``rounding`` of
        PyTorch's own float32 where that is no smaller, ``bytes``, ``seconds``,
        ``least`` size, and ``fault``, why it failed, or ``None``.
    """
    source = random_source(load_config(path, options), Path(path).stem)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in formats:
            target = Path(folder, f"model.{suffix}")
            row: dict[str, Any] = {"config": path, "model": Path(path).stem, "format": suffix}
            try:
                written = export(source, target, Options())
            except UserError as error:
                rows.append({**row, "fault": str(error)})
                continue
            rows.append(
                {
                    **row,
                    "difference": written.random.largest,
                    "rounding": written.random.rounding,
                    "bytes": written.path.stat().st_size,
                    "seconds": round(written.seconds, 1),
                    "least": written.input.least,
                    "fault": None,
                }
            )
            written.path.unlink()
    return rows
