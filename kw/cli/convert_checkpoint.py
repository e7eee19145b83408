"""Turn a checkpoint that the authors released into one of this project's.

kw convert released released.pth configs/imagenet/resnet18/kw_resnet18_1x.yaml \\
    kw_resnet18_1x.pth
kw test configs/imagenet/resnet18/kw_resnet18_1x.yaml kw_resnet18_1x.pth

A source may hold the network (model) and a moving average of it (ema). --weights says which of them
the target gets: "all" keeps both, as a training run of this project does, and kw test reports
the average first; "model" and "ema" keep one, as the target's only weights.
"""

from pathlib import Path

import torch

from ..config import load_config
from ..models import build_network
from ..models.authors_checkpoints import AuthorsFileError, read_authors_file, translate
from ..training import CheckpointError
from .convert_network import save_converted
from .tool import ToolParser, add_config_options, output_file


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a file that they released")
    add_config_options(parser)
    parser.add_argument("target", type=output_file, metavar="TARGET", help="the file to write")
    parser.add_argument("--weights", choices=("all", "model", "ema"), default="all")
    args = parser.parse_args()
    source, target = args.source, args.target
    if target.resolve() == source.resolve():
        raise CheckpointError(f"{target}: expected the name of a new file as TARGET")
    config = load_config(args.config, args.cfg_options)
    with torch.device("meta"):
        network = build_network(config.model)

    weights = read_authors_file(source)
    found = {"model": weights.model, "ema": weights.average}
    present = [name for name, state in found.items() if state is not None]
    chosen = present if args.weights == "all" else [args.weights]
    states = {}
    for name in chosen:
        state = found[name]
        if state is None:
            raise AuthorsFileError(
                f"{source}: --weights {name}: it holds {' and '.join(present)} only"
            )
        key = "ema_state_dict" if name == "ema" and len(chosen) > 1 else "state_dict"
        states[key] = translate(state, network, config.model.name, f"{source} ({name})")
        print(f"{source}: {name}, {len(state)} tensors -> {key}")
    save_converted(target, config, source.name, states, epoch=weights.epoch, weights=chosen)
