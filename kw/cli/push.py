"""Publish a trained model on the Hugging Face Hub: weights, timm's config.json, a model card.

kw push work_dirs/kw_resnet18_1x user/kw_resnet18_1x --license apache-2.0
kw push work_dirs/kw_resnet18_1x user/kw_resnet18_1x@fp16 --precision fp16
kw push work_dirs/kw_resnet18_1x --dry-run folder

RUN is a work directory or a checkpoint in it. --dry-run writes the files and publishes nothing.
Files of the same names there are replaced, and nothing is deleted. Log in with hf auth login, or
set HF_TOKEN (docs/hub.md).
"""

import re
import sys
import tempfile
from pathlib import Path

from .tool import ToolParser, output_folder


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a work directory, or a checkpoint in it")
    parser.add_argument(
        "name",
        nargs="?",
        metavar="USER/MODEL",
        help="the repository; @BRANCH for another than main",
    )
    parser.add_argument(
        "--dry-run", type=output_folder, metavar="DIR", help="write the files into DIR instead"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="auto: the moving average, if any",
    )
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    args = parser.parse_args()
    if args.name is None and args.dry_run is None:
        parser.error("the following arguments are required: USER/MODEL, or --dry-run DIR")

    from ..deploy.publish import Plan, publish, write_folder
    from ..hub import split_name

    run = Path(args.run).absolute()
    own = (run.parent if run.suffix == ".pth" else run).name
    name = args.name or f"user/{re.sub(r'[^A-Za-z0-9_.-]', '-', own)}"
    repository, branch = split_name(name)
    name = repository if branch is None else f"{repository}@{branch}"
    plan = Plan(name, args.weights, args.precision, args.license)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dry_run or Path(temporary)
        for note in write_folder(args.run, folder, plan):
            print(f"note: {note}", file=sys.stderr)
        for file in sorted(folder.iterdir()):
            print(f"{file.name:20s} {file.stat().st_size:12,d} bytes")
        if args.dry_run is None:
            print(publish(folder, plan, args.private, args.message))
        else:
            print(f"wrote {folder}; nothing was published")
