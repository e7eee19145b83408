"""Count what networks cost: parameters, multiply-adds, assembled kernels, warehouses.

kw inspect costs configs/imagenet/resnet18/*.yaml --json costs.json

One image at data.input_size. "static" counts every dynamic layer as the static layer whose place it
takes; assembling the kernels and the attention branches come on top of it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..config import load_config
from ..evaluation import render_table
from ..models.complexity import Complexity, analyze
from .tool import ToolParser, add_options, output_file, save_json

__all__ = ["main"]


def costs_table(rows: Sequence[tuple[str, Complexity]]) -> str:
    """One line a network; M, G and MB are 10^6, 10^9 and 10^6 bytes."""
    header = ("model", "parameters", "static", "assembly", "attention", "kernels (fp32)")
    return render_table(
        header,
        [
            (
                name,
                f"{cost.params / 1e6:.2f}M",
                f"{cost.macs_static / 1e9:.3f} G",
                f"{cost.macs_assembly / 1e9:.3f} G",
                f"{cost.macs_attention / 1e6:.2f} M",
                f"{cost.kernel_bytes / 1e6:.1f} MB",
            )
            for name, cost in rows
        ],
    )


def warehouses_table(cost: Complexity) -> str:
    """One line a warehouse."""
    header = ("warehouse", "cells", "cell shape", "mixtures", "layers")
    return render_table(
        header,
        [
            (
                warehouse.name,
                str(warehouse.cells),
                "x".join(map(str, warehouse.cell_shape)),
                str(warehouse.mixtures),
                str(len(warehouse.layers)),
            )
            for warehouse in cost.warehouses
        ],
    )


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="configuration files (YAML)")
    add_options(parser)
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the exact counts to FILE"
    )
    args = parser.parse_args()
    # All files are checked before the first network is built.
    loaded = [(path, load_config(path, args.cfg_options)) for path in args.configs]
    found = [(path, Path(path).stem, analyze(config)) for path, config in loaded]
    print("For one image: multiply-adds of the static network, of assembling kernels, of attention")
    print(costs_table([(name, cost) for _, name, cost in found]))
    for _, name, cost in found:
        if cost.warehouses:
            print(f"\nWarehouses of {name}")
            print(warehouses_table(cost))
    if args.json is not None:
        rows = [{"config": path, "model": name, **asdict(cost)} for path, name, cost in found]
        save_json(rows, args.json)
