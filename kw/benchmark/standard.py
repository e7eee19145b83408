"""The standard set of a machine: the runs that its targets are about."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from ..config.names import configs
from .conditions import Conditions, device_slug

__all__ = ["StandardRun", "standard_runs"]

_CONFIGS = configs() / "imagenet"


@dataclass(frozen=True)
class StandardRun:
    """One run of the set.

    Attributes:
        family: what its result is called after.
        ratios: of the configurations measured together, beside one static network.
        conditions: of the run.
    """

    family: str
    ratios: tuple[str, ...]
    conditions: Conditions

    @property
    def configs(self) -> list[str]:
        """The configuration files."""
        names = [f"kw_{self.family}_{ratio}.yaml" for ratio in self.ratios]
        return [str(_CONFIGS / self.family / name) for name in names]


def standard_runs(
    pattern: str = "*", *, on_gpu: bool | None = None, threads: int = 2
) -> list[StandardRun]:
    """The runs that make up the set.

    Args:
        pattern: of the results' names, e.g. ``"*-infer-*"``: only those.
        on_gpu: whether the set is a GPU's; by default, if PyTorch sees one.
        threads: of PyTorch's operators on CPU.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    device = device_slug("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    runs = _gpu(threads) if on_gpu else _cpu(threads)
    return [run for run in runs if fnmatch(run.conditions.file_name(run.family, device), pattern)]


def _cpu(threads: int) -> list[StandardRun]:
    """About a quarter of an hour on two cores, so with few rounds where a step takes seconds."""

    def conditions(mode: str, batch_size: int, rounds: int) -> Conditions:
        return Conditions(mode, "cpu", "float32", batch_size, 224, threads, rounds=rounds)

    return [
        StandardRun("resnet18", ("1x", "4x"), conditions("inference", 8, 25)),
        StandardRun("resnet18", ("1x", "4x"), conditions("train", 8, 15)),
        StandardRun("resnet18", ("4x",), conditions("memory", 32, 1)),
        StandardRun("resnet50", ("1x", "4x"), conditions("inference", 8, 12)),
    ]


def _gpu(threads: int) -> list[StandardRun]:
    # As configurations come (NCHW, eager), and as one would make them fast.
    forms = ((False, False), (True, False), (True, True))
    return [
        StandardRun(
            family,
            ("1x", "4x"),
            Conditions(
                mode, "cuda", "bfloat16", 128, 224, threads, channels_last, compiled, rounds=20
            ),
        )
        for family in ("resnet18", "resnet50")
        for mode in ("inference", "train", "memory")
        for channels_last, compiled in forms
    ]
