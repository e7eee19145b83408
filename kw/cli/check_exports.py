"""Try whether configurations export, with random weights, and how far the files are from PyTorch.

kw benchmark exportable configs/imagenet/*/*.yaml --json exports.json

A line a configuration and format: the largest difference of logits from PyTorch's, relative to the
largest, on noise of several batch sizes and sizes. The status is 2 if any failed.
"""

import argparse
from typing import Any

from ..deploy import ExportError
from ..deploy.sweep import try_export
from .tool import ToolParser, add_options, output_file, save_json


def _rounding(row: dict[str, Any]) -> str:
    """Of PyTorch's float32, where it is what the difference consists of."""
    return "" if row["rounding"] is None else f" (float32 itself {row['rounding']:.1e})"


__all__ = ["main"]


def main() -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="configuration files (YAML)")
    add_options(parser)
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("onnx", "pt2", "safetensors"),
        default=["onnx", "pt2", "safetensors"],
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    rows = []
    print("| model | format | largest difference | MB | seconds | least size |")
    print("|---|---|---|---|---|---|", flush=True)
    for config in args.configs:
        for row in try_export(config, args.formats, args.cfg_options):
            rows.append(row)
            found = (
                f"{row['difference']:.1e}{_rounding(row)} | {row['bytes'] / 1e6:.1f} | "
                f"{row['seconds']} | {row['least'] or 'fixed'}"
                if row["fault"] is None
                else f"failed: {row['fault']} | | |"
            )
            print(f"| {row['model']} | {row['format']} | {found} |", flush=True)
            if args.json is not None:
                save_json(rows, args.json)
    failed = [f"{row['model']}.{row['format']}" for row in rows if row["fault"] is not None]
    if failed:
        raise ExportError(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")
