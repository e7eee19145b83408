#!/usr/bin/env python
"""Try whether configurations export, with random weights, and how far the files are from PyTorch.

python scripts/check_exports.py configs/imagenet/*/*.yaml --json exports.json

A line a configuration and format: the largest difference of logits from PyTorch's, relative to the
largest, on noise of several batch sizes and sizes. The status is 2 if any failed.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kw.cli import ToolParser, output_file, run_tool
from kw.cli.tool import add_options, save_json
from kw.config import Config, load_config
from kw.deploy import ExportError, Source, export
from kw.deploy.description import Description, InputRange
from kw.deploy.export import Options
from kw.deploy.source import ready
from kw.errors import UserError
from kw.models import build_network

FORMATS = ("onnx", "pt2", "safetensors")


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="configuration files (YAML)")
    add_options(parser)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    # Line by line: all configurations take an hour.
    print("| model | format | largest difference | MB | seconds | least size |")
    print("|---|---|---|---|---|---|", flush=True)
    for config in args.configs:
        source = random_source(load_config(config, args.cfg_options), Path(config).stem)
        for suffix in args.formats:
            row = {"config": config, "model": source.description.model, "format": suffix}
            row |= try_export(source, suffix)
            rows.append(row)
            if row["fault"] is not None:
                found = f"failed: {row['fault']} | | |"
            else:
                rounding = row["rounding"]
                own = "" if rounding is None else f" (float32 itself {rounding:.1e})"
                found = f"{row['difference']:.1e}{own} | {row['bytes'] / 1e6:.1f} | "
                found += f"{row['seconds']} | {row['least'] or 'fixed'}"
            print(f"| {row['model']} | {suffix} | {found} |", flush=True)
            if args.json is not None:
                save_json(rows, args.json)
    failed = [f"{row['model']}.{row['format']}" for row in rows if row["fault"] is not None]
    if failed:
        raise ExportError(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")


def try_export(source: Source, suffix: str) -> dict[str, Any]:
    """What exporting into a folder that is removed found: figures, or the fault."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = export(source, Path(folder, f"model.{suffix}"), Options())
        except UserError as error:
            return {"fault": str(error)}
        return {
            "difference": written.random.largest,
            "rounding": written.random.rounding,
            "bytes": written.path.stat().st_size,
            "seconds": round(written.seconds, 1),
            "least": written.input.least,
            "fault": None,
        }


def random_source(config: Config, name: str) -> Source:
    """A configuration's network with weights of :func:`randomise`."""
    torch.manual_seed(0)
    images = torch.randn(8, config.data.channels, *config.data.shape)
    network = randomise(build_network(config.model), images)
    classes = [str(label) for label in range(config.model.num_classes)]
    description = Description(name, classes, config, "model", 0, {}, InputRange.of(config.data))
    return Source(ready(network), description, [])


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
                # Fresh softmaxes change completely with a rounding error, layer after layer: why
                # peers begin at temperature 30.
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


if __name__ == "__main__":
    run_tool(main)
