#!/usr/bin/env python
"""Measure what the attention of a trained network does on test images, layer by layer.

python tools/measure_attention.py CONFIG CHECKPOINT --images 128
"""

from typing import Any

import torch

from kw.cli import ToolParser, add_config_options, number, run_tool
from kw.config import load_config
from kw.data import BatchPreprocessor, check_data_root, open_validation, stop_workers
from kw.engine import load_checkpoint
from kw.engine.checkpoint import load_network
from kw.errors import UserError
from kw.evaluation import render_table
from kw.models import build_network, check_network
from kw.warehouse.coefficients import measure_coefficients


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "--images",
        type=number(int, 2, 4096),
        default=128,
        help="test images, evenly over the data set; default 128",
    )
    args = parser.parse_args()
    config = load_config(args.config, args.cfg_options)
    check_data_root(config.data.root, config.model.num_classes, ["val"])
    network = build_network(config.model)
    check_network(network, config.model, config.data.input_size)
    load_network(network, load_checkpoint(args.checkpoint)["state_dict"], args.checkpoint)
    config.data.memory = None  # few images are read
    loader: Any = open_validation(config, torch.device("cpu"), 0, 1)
    step = max(1, len(loader.dataset) // args.images)
    keys = [(0, index) for index in range(0, len(loader.dataset), step)][: args.images]
    images, _ = BatchPreprocessor(config.data, config.model.num_classes)(
        loader.collate_fn([loader.dataset[key] for key in keys]), False
    )
    stop_workers(loader)
    found = measure_coefficients(network, images)
    if not found:
        raise UserError(f"{args.config}: no layer with kernel attention: the network is not KW's")
    header = ("layer", "mixtures", "cells", "own", "others", "negative", "variation")
    rows = [
        (each.layer, str(each.mixtures), str(each.cells), *(f"{x:.3f}" for x in each[3:]))
        for each in found
    ]
    print(render_table(header, rows))


if __name__ == "__main__":
    run_tool(main)
