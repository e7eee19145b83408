"""Count what networks cost: parameters, multiply-adds, assembled kernels, warehouses.

kw inspect costs configs/imagenet/resnet18/*.yaml --json costs.json

One image at data.input_size. "static" counts every dynamic layer as the static layer whose place it
takes; assembling the kernels and the attention branches come on top of it.
"""

from dataclasses import asdict

from ..config import load_config
from ..config.names import name_of_config
from ..evaluation import render_table
from ..models.complexity import Complexity, WarehouseSize, analyze
from .tool import ToolParser, add_options, output_file, save_json

COSTS = ("model", "parameters", "static", "assembly", "attention", "kernels (fp32)")
WAREHOUSES = ("warehouse", "cells", "cell shape", "mixtures", "layers")


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
    found = [(path, name_of_config(path), analyze(config)) for path, config in loaded]
    print("For one image: multiply-adds of the static network, of assembling kernels, of attention")
    print(render_table(COSTS, [(name, *_costs(cost)) for _, name, cost in found]))
    for _, name, cost in found:
        if cost.warehouses:
            print(f"\nWarehouses of {name}")
            print(render_table(WAREHOUSES, [_size(each) for each in cost.warehouses]))
    if args.json is not None:
        rows = [{"config": path, "model": name, **asdict(cost)} for path, name, cost in found]
        save_json(rows, args.json)


def _costs(cost: Complexity) -> tuple[str, ...]:
    """M, G and MB are 10^6, 10^9 and 10^6 bytes."""
    return (
        f"{cost.params / 1e6:.2f}M",
        f"{cost.macs_static / 1e9:.3f} G",
        f"{cost.macs_assembly / 1e9:.3f} G",
        f"{cost.macs_attention / 1e6:.2f} M",
        f"{cost.kernel_bytes / 1e6:.1f} MB",
    )


def _size(warehouse: WarehouseSize) -> tuple[str, ...]:
    shape = "x".join(map(str, warehouse.cell_shape))
    counts = map(str, (warehouse.mixtures, len(warehouse.layers)))
    return warehouse.name, str(warehouse.cells), shape, *counts
