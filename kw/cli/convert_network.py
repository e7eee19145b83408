"""Convert a trained static network: its checkpoint in, a converted network's checkpoint out.

kw convert network configs/imagenet/resnet18/kw_resnet18_1x.yaml kw_resnet18_1x.pth \\
    --weights resnet18.safetensors --images data/imagenet/val
kw test configs/imagenet/resnet18/kw_resnet18_1x.yaml kw_resnet18_1x.pth

Prints what every warehouse kept, and how far the outputs are from the static network's. Below a
budget of 1 kernels are kept in part; every other one of --images then says which part matters, and
the rest measure the difference. The start is "keep", whatever the configuration says.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import ConfigError, load_config, to_yaml
from ..config.schema import Config
from ..data import BatchPreprocessor, read_files
from ..deploy import find_images
from ..errors import writing
from ..evaluation import render_table
from ..models import check_network, start_network
from ..models.build import read_start, with_start
from ..models.weights import CheckpointError, is_converted
from ..pictures.samples import spaced
from ..training.checkpoint import save_checkpoint
from .tool import ToolParser, add_config_options, number, output_file


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("target", type=output_file, metavar="TARGET", help="the file to write")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="of the static network: a file, timm or timm:TAG; default: model.weights",
    )
    parser.add_argument("--images", metavar="FOLDER", help="real images; default: random ones")
    parser.add_argument(
        "--count", type=number(int, 2, 10**6), default=128, metavar="N", help="images, default 128"
    )
    args = parser.parse_args()
    config = load_config(args.config, args.cfg_options)
    model = replace(config.model, weights=args.weights or config.model.weights, freeze=[])
    if model.weights is None:
        raise ConfigError("expected the static network's weights: --weights or model.weights")
    if model.kernel_warehouse is None and model.peer is None:
        raise ConfigError(f"{args.config} is a static network; expected model.kernel_warehouse")
    converted = with_start(model, "keep")

    torch.manual_seed(config.seed)
    state, plain = read_start(model), replace(model, kernel_warehouse=None, peer=None)
    if is_converted(state):
        raise ConfigError(f"{model.weights} holds a converted network already")
    static = start_network(plain, state, model.weights).eval()
    check_network(static, model, config.data.shape)
    images = _images(config, args.images, args.count)
    fit = images[::2].split(32) if args.images else None
    network = start_network(converted, static.state_dict(), model.weights, batches=fit)
    kept = getattr(network, "warehouses", None)
    whole = kept is None or all(w.kept == 1 for w in kept.conversion.warehouses.values())
    unseen = images if whole else images[1::2]
    if not len(unseen):
        raise ConfigError("--images: expected two images at least, below a budget of 1")
    table, difference, same = _compare(static, network.eval(), unseen)
    print(table)
    what = "images" if args.images else "random images"
    print(
        f"outputs on {len(unseen)} {what}: largest difference {difference:.2e} of the largest "
        f"logit, the same class for {same}"
    )
    states = {"state_dict": network.state_dict()}
    save_converted(args.target, replace(config, model=converted), Path(model.weights).name, states)


def save_converted(
    target: Path, config: Config, source: str, states: Mapping[str, Any], **meta: Any
) -> None:
    """Write weights that no run of this project trained, with the network's configuration."""
    versions = {"kernelwarehouse": __version__, "torch": str(torch.__version__)}
    meta |= {"config": to_yaml(config), "source": source, "versions": versions}
    with writing(target, CheckpointError):
        save_checkpoint({"meta": meta, **states}, target)
    print(f"wrote {target}")


def _images(config: Config, folder: str | None, count: int) -> torch.Tensor:
    """Normalised images ``[B, C, H, W]``, spread over a folder's files, or noise."""
    data = config.data
    if folder is None:
        return torch.randn(count, data.channels, *data.shape)
    files = find_images([folder])
    chosen = [files[place] for place in spaced(len(files), count)]
    return BatchPreprocessor(data, config.model.num_classes)(read_files(chosen, data), False)[0]


@torch.no_grad()
def _compare(
    static: torch.nn.Module, network: torch.nn.Module, images: torch.Tensor
) -> tuple[str, float, int]:
    """The table of warehouses, the largest relative difference, equal classes."""
    before = torch.cat([static(part) for part in images.split(32)])
    after = torch.cat([network(part) for part in images.split(32)])
    warehouses = getattr(network, "warehouses", None)
    rows = [] if warehouses is None else warehouses.conversion.rows()
    table = render_table(("warehouse", "layers", "mixtures", "cells", "kept"), rows)
    difference = ((after - before).abs().max() / before.abs().max()).item()
    same = int((after.argmax(1) == before.argmax(1)).sum())
    return table, difference, same
