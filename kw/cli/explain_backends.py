"""Print which back end computes each layer of a network, and its predicted time.

kw inspect backends configs/imagenet/resnet18/kw_resnet18_1x.yaml --batch-size 8
kw inspect backends configs/imagenet/resnet18/kw_resnet18_1x.yaml --gpu h200

Times are predictions of a cost model, forward and backward pass apart (docs/benchmarks.md).
"""

from collections.abc import Sequence

import torch

from ..config import load_config
from ..evaluation import render_table
from ..models import build_network, check_network
from ..training import set_contraction
from ..training.precision import DTYPES
from ..training.run import uses_channels_last
from ..warehouse import LayerChoice, explain
from ..warehouse.explain import explain_on
from ..warehouse.ops.gpus import GPUS
from ..warehouse.ops.selection import Prediction
from .tool import ToolParser, add_config_options, device, number


def milliseconds(costs: Sequence[Prediction]) -> dict[str, str]:
    """The predicted times by back end, the fastest first."""
    known = {cost.name: cost.seconds for cost in costs if cost.seconds is not None}
    return {name: f"{seconds * 1e3:.2f}" for name, seconds in known.items()}


def row(choice: LayerChoice) -> tuple[str, ...]:
    """One layer as a line of the table."""
    if choice.problem is None:
        return (choice.layer, "", choice.forward, "-", choice.backward, "-", "")
    spec = choice.problem.spec
    kernel = "x".join(map(str, spec.partition.kernel))
    forward, backward = map(milliseconds, (choice.forward_costs, choice.backward_costs))
    others = [f"{name} {time}" for name, time in forward.items() if name != choice.forward]
    return (
        choice.layer,
        f"{spec.in_channels}->{spec.out_channels} {kernel} @{choice.problem.size[0]}",
        choice.forward,
        forward.get(choice.forward, "-"),
        choice.backward,
        backward.get(choice.backward, "-"),
        ", ".join(others[:2]),
    )


def main() -> None:
    parser = ToolParser(__doc__)
    add_config_options(parser)
    parser.add_argument("--batch-size", type=number(int, 1), help="default: the configuration's")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--gpu", choices=GPUS, help="one that is not there, by its data sheet")
    parser.add_argument("--precision", choices=DTYPES, help="default: the configuration's")
    parser.add_argument(
        "--threads", type=number(int, 1, 1024), help="of operators on CPU; default: PyTorch's"
    )
    args = parser.parse_args()
    if args.gpu:
        args.device = "cpu"

    config = load_config(args.config, args.cfg_options)
    if args.threads:
        torch.set_num_threads(args.threads)
    network = build_network(config.model)
    check_network(network, config.model, config.data.shape)
    network.to(args.device).eval()
    set_contraction(config.contraction, network)
    batch = args.batch_size or config.batch_size
    size = (1 if args.gpu else batch, config.data.channels, *config.data.shape)
    images = torch.zeros(size, device=args.device)
    if uses_channels_last(config, torch.device("cuda" if args.gpu else args.device)):
        images = images.to(memory_format=torch.channels_last)
    dtype = DTYPES[args.precision or config.precision]
    kind = torch.device(args.device).type
    with torch.autocast(kind, dtype, enabled=dtype is not None and not args.gpu):
        choices = explain(network, images)
    if args.gpu:
        dtype = dtype or torch.float32
        choices = [explain_on(choice, batch, dtype, GPUS[args.gpu].profile()) for choice in choices]
    header = ("layer", "shape", "forward", "ms", "backward", "ms", "forward otherwise")
    print(render_table(header, [row(choice) for choice in choices]))
