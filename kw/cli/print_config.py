"""Print a resolved configuration, list the configurations of this project, explain the keys.

kw config configs/imagenet/resnet18/kw_resnet18_1x.yaml --cfg-options seed=1
kw config configs/coco/mask_rcnn_kw_resnet50_1x.py
kw config --list "*resnet50*"
kw config --reference               # of a classifier's settings
kw config --reference detection     # of a detector's
"""

import sys

from ..config import Config, reference, to_yaml
from ..config.names import config_names
from ..runs import load_run
from .tool import ToolParser, add_config_options


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser, nargs="?")
    parser.add_argument(
        "--reference",
        nargs="?",
        const="classification",
        choices=("classification", "detection"),
        help="print every key with its meaning",
    )
    parser.add_argument(
        "--list", nargs="?", const="*", metavar="PATTERN", help="list the configurations by name"
    )
    args = parser.parse_args()
    if args.reference == "detection":
        from ..detection.schema import DetectionConfig

        sys.stdout.write(reference(DetectionConfig))
    elif args.reference is not None:
        sys.stdout.write(reference())
    elif args.list is not None:
        for name, file in config_names(args.list).items():
            print(f"{name:32s} {file}")
    elif args.config is None:
        parser.error("the following arguments are required: CONFIG")
    else:
        config, _ = load_run(args.config, args.cfg_options)
        sys.stdout.write(to_yaml(config) if isinstance(config, Config) else config.to_python())
