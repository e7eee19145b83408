"""Check in a minute what works on this machine, and measure its rates for the selector.

kw doctor
kw doctor --json report.json

Every back end computes layers of the papers' models in every type; outputs and gradients are
compared with float64 and timed. The rates go into a file that chooses back ends from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..benchmark import doctor
from ..benchmark.doctor import (
    Finding,
    calibrated,
    describe_tools,
    examine,
    examine_attention,
    measure_rates,
)
from ..benchmark.machine import describe_machine, describe_versions
from ..evaluation import render_table
from ..version import __version__
from ..warehouse.ops import CONTRACTIONS
from ..warehouse.ops.calibration import write_calibration
from ..warehouse.ops.device import DeviceProfile
from ..warehouse.ops.trials import DeviceLostError
from .tool import ToolParser, number, output_file, save_json


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="to attach to a report")
    parser.add_argument(
        "--seconds",
        type=number(float, 0),
        default=50.0,
        help="for each device (default: %(default)g)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the rates that are used now: write no file of them",
    )
    args = parser.parse_args()
    report: dict[str, Any] = {"kernelwarehouse": __version__, "devices": {}}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        report["devices"][device] = _examine(device, args.seconds, not args.keep)
    if len(devices) == 1:
        print("cuda: torch sees no GPU")
    if args.json is not None:
        save_json(report, args.json)


def _examine(device: str, seconds: float, write: bool) -> dict[str, Any]:
    machine, versions, tools = (
        describe(device) for describe in (describe_machine, describe_versions, describe_tools)
    )
    print(f"{device}: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores")
    print("  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print("  " + ", ".join(f"{name}: {text}" for name, text in tools.items()))
    rates = measure_rates(device)
    print("  " + _words(rates))
    findings: list[Finding] = []
    lost = None
    try:
        if device == "cuda":
            tools["attention kernel"] = examine_attention(device)
            print(f"  attention kernel: {tools['attention kernel']}")
        findings += examine(device, rates, seconds)
    except DeviceLostError as error:
        lost = str(error)
    profile = calibrated(rates, findings)
    rows = [_row(name, findings, profile) for name in CONTRACTIONS]
    header = ("back end", "works in", "largest error", "time / predicted", "remarks")
    print(render_table(header, rows))
    tried, shapes = len({finding.shape for finding in findings}), len(doctor.SHAPES)
    if tried < shapes:
        print(f"  {tried} of {shapes} shapes in {seconds:g} s; --seconds gives more time")
    for name, reason in profile.bans.items():
        print(f"  BANNED: {name}: {reason}")
    if lost:
        print(f"  STOPPED: {lost}")
    path = None
    if write and lost is None and tried == shapes:
        path = str(write_calibration(device, profile))
        print(f"  choices are made from {path} from now on")
    elif write:
        print("  no rates are kept: not everything was tried")
    return {
        "machine": machine,
        "versions": versions,
        "tools": tools,
        "profile": profile.to_json(),
        "findings": [finding.to_json() for finding in findings],
        "lost": lost,
        "calibration": path,
    }


def _words(rates: DeviceProfile) -> str:
    products = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {rate / 1e9:,.1f}"
        for dtype, rate in rates.dense.items()
    )
    tf32 = f", as convolutions round {rates.tf32 / 1e9:,.0f}" if rates.tf32 else ""
    return (
        f"products in G multiply-adds/s: {products}{tf32}; "
        f"memory {rates.bandwidth / 1e9:,.0f} GB/s; a call {rates.launch * 1e6:.1f} us"
    )


def _row(name: str, findings: Sequence[Finding], profile: DeviceProfile) -> tuple[str, ...]:
    own = [finding for finding in findings if finding.backend == name]
    done = [finding for finding in own if finding.deviations]
    dtypes = dict.fromkeys(f.dtype for f in done if f"{name} {f.dtype}" not in profile.bans)
    worst = {
        dtype: max(max(f.deviations.values()) for f in done if f.dtype == dtype) for dtype in dtypes
    }
    refusals = list(dict.fromkeys(finding.refusal for finding in own if finding.refusal))
    more = f" ({len(refusals) - 1} more in --json)" if len(refusals) > 1 else ""
    factors = profile.factors.get(name)
    return (
        name,
        ", ".join(dtypes) or "nothing here",
        ", ".join(f"{value:.0e}" for value in worst.values()),
        f"{factors[0]:.2f}, {factors[1]:.2f}" if factors else "",
        f"{refusals[0]}{more}" if refusals else "",
    )
