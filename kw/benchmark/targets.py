"""Targets: ratios that were set before anything was measured. They are goals, not findings.

All are of the back end ``auto``, against the static network in the same run unless they say
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .results import Measured, Result, Spread

__all__ = ["TARGETS", "Check", "Target", "check_targets", "target_for"]


@dataclass(frozen=True)
class Target:
    """A bound on a ratio.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``; the GPU targets are for one of the class of an H200.
        mode: of the run; of a training step the total counts.
        model: the configuration's name.
        batch_size: images per step.
        limit: the ratio must not be above it; or below it, for ``to="grouped"``.
        to: ``"static"``: its figure over the static network's; ``"grouped"``: how many times as
            fast as the grouped form.
    """

    device: str
    mode: str
    model: str
    batch_size: int
    limit: float
    to: str = "static"

    def applies(self, result: Result, network: Measured) -> bool:
        """Whether it is about this figure: 224 x 224; two threads of float32, or bfloat16."""
        c = result.conditions
        conditions = (c.device, c.mode, c.batch_size, c.input_size, c.dtype)
        dtype = "float32" if self.device == "cpu" else "bfloat16"
        return (
            (network.model, network.backend) == (self.model, "auto")
            and conditions == (self.device, self.mode, self.batch_size, 224, dtype)
            and (c.device != "cpu" or c.threads == 2)
        )

    def is_met(self, ratio: float) -> bool:
        """Whether a measured ratio keeps it."""
        return ratio >= self.limit if self.to == "grouped" else ratio <= self.limit

    def __str__(self) -> str:
        return f">= {self.limit:g}x as fast" if self.to == "grouped" else f"<= {self.limit:g}"


TARGETS = (
    Target("cpu", "inference", "kw_resnet18_1x", 8, 1.35),
    Target("cpu", "inference", "kw_resnet18_4x", 8, 2.0),
    Target("cpu", "inference", "kw_resnet50_1x", 8, 1.7),
    Target("cpu", "inference", "kw_resnet50_4x", 8, 3.15),
    Target("cpu", "train", "kw_resnet18_1x", 8, 1.6),
    Target("cpu", "train", "kw_resnet18_4x", 8, 2.3),
    Target("cpu", "memory", "kw_resnet18_4x", 32, 1.5),
    Target("cuda", "inference", "kw_resnet18_4x", 128, 1.5),
    Target("cuda", "inference", "kw_resnet50_4x", 128, 2.0),
    Target("cuda", "train", "kw_resnet18_4x", 128, 2.0),
    Target("cuda", "train", "kw_resnet50_4x", 128, 2.5),
    *(
        Target("cuda", mode, model, 128, 8, to="grouped")
        for mode in ("inference", "train")
        for model in ("kw_resnet18_4x", "kw_resnet50_4x")
    ),
    Target("cuda", "memory", "kw_resnet18_4x", 128, 1.5),
    Target("cuda", "memory", "kw_resnet50_4x", 128, 1.5),
)


@dataclass(frozen=True)
class Check:
    """A target against one result.

    Attributes:
        target: the target.
        result: of which run.
        ratio: as measured; ``None`` where there is no figure.
        met: whether the median keeps it; ``None`` where there is no figure.
    """

    target: Target
    result: Result
    ratio: Spread | None
    met: bool | None


def check_targets(results: Iterable[Result]) -> list[Check]:
    """Every target against every result that it is about, in the order of the targets."""
    checks = []
    ordered = list(results)
    for target in TARGETS:
        for result in ordered:
            for network in result.networks:
                if not target.applies(result, network):
                    continue
                ratio = _ratio(target, result, network)
                met = None if ratio is None else target.is_met(ratio.median)
                checks.append(Check(target, result, ratio, met))
    return checks


def target_for(result: Result, model: str) -> Target | None:
    """The bound on a network's ratio to the static one under a result's conditions."""
    for target in TARGETS:
        if target.to == "static" and target.applies(result, Measured(model, "auto")):
            return target
    return None


def _ratio(target: Target, result: Result, network: Measured) -> Spread | None:
    if network.problem is not None:
        return None
    if target.to == "static":
        return result.ratio(network, result.static)
    grouped = result.grouped(network.model)
    return None if grouped is None else result.ratio(grouped, network)
