"""Say what of this installation and machine works: versions, devices, compiler, every back end.

kw doctor --json report.json
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..benchmark.machine import describe_machine, describe_versions
from ..errors import one_line
from ..version import __version__
from ..warehouse import Plan, Rule, convert, set_backend
from ..warehouse.ops import BACKENDS
from .tool import ToolParser, output_file, save_json

__all__ = ["main"]

_TOLERANCE = 1e-4  # of outputs and gradients in float32, relative to the largest value


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="to attach to a report")
    args = parser.parse_args()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    report: dict[str, Any] = {"kernelwarehouse": __version__, "devices": {}}
    for device in devices:
        machine, versions = describe_machine(device), describe_versions(device)
        found = {name: _try(name, device) for name in BACKENDS}
        report["devices"][device] = {"machine": machine, "versions": versions, "back_ends": found}
        print(f"{device}: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores")
        print("  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
        for name, outcome in found.items():
            print(f"  {name:10s} {outcome}")
    if len(devices) == 1:
        print("cuda: torch sees no GPU")
    if args.json is not None:
        save_json(report, args.json)


def _try(backend: str, device: str) -> str:
    """What becomes of a small layer's outputs and gradients, against float64."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))
    plan = Plan((Rule("0", "cells"),))
    exact = convert(layer, plan, cell_num_ratio=2, start="paper", announce=False).double()
    tried = copy.deepcopy(exact).float().to(device)
    x = torch.randn(4, 16, 14, 14, dtype=torch.float64)
    try:
        set_backend(exact, "reference")
        set_backend(tried, backend)
        expected, found = _pass(exact, x), _pass(tried, x.float().to(device))
    except ValueError as error:
        return f"not here: {error}"
    except Exception as error:  # what a compiler, a driver or a library raises
        return f"FAILS: {one_line(error)}"
    worst = max(
        float((a.cpu().double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )
    return f"{'works' if worst <= _TOLERANCE else 'WRONG'}: {worst:.0e} from float64"


def _pass(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters that have one."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients]
