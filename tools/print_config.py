#!/usr/bin/env python
"""Check a configuration and print it resolved, with every setting.

python tools/print_config.py configs/imagenet/resnet18/kw_resnet18_1x.yaml --cfg-options seed=1
python tools/print_config.py --reference
"""

import argparse
import sys
from typing import Any

from kw.cli import add_config_options, run_tool
from kw.config import load_config, reference, to_yaml


class _Reference(argparse.Action):
    # Like --help: answers and exits, so that CONFIG need not be given.
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(reference())
        parser.exit()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_config_options(parser)
    parser.add_argument(
        "--reference", action=_Reference, nargs=0, help="print every key with its meaning, and exit"
    )
    args = parser.parse_args()
    sys.stdout.write(to_yaml(load_config(args.config, args.cfg_options)))


if __name__ == "__main__":
    run_tool(main)
