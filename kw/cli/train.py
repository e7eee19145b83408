"""Train and evaluate a classifier or a detector.

kw train configs/imagenet/resnet18/kw_resnet18_1x.yaml
kw train configs/coco/mask_rcnn_kw_resnet50_1x.py
torchrun --nproc-per-node 8 -m kw train CONFIG --launcher pytorch
"""

from ..runs import default_folder, load_run
from ..training.distributed import LAUNCHERS
from .tool import ToolParser, add_config_options, output_folder

_WORK_DIR = "default: work_dirs/CONFIG's name; of a run's own config.yaml or config.py, its folder"


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("--work-dir", type=output_folder, help=_WORK_DIR)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue from CHECKPOINT, or from the newest one of the work directory",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none")
    args = parser.parse_args()
    config, task = load_run(args.config, args.cfg_options)
    work_dir = args.work_dir or default_folder(args.config)
    task.train(config, work_dir, resume=args.resume, launcher=args.launcher)
