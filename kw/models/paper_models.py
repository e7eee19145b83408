"""The papers' KernelWarehouse models: which static network, which plan, which ratios.

The names are those of the papers' tables and of ``configs/imagenet``, which states the same ratios
with a recipe; a test compares the two. This module does not need timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch


@dataclass(frozen=True)
class PaperModel:
    """A KernelWarehouse model of the papers.

    Attributes:
        backbone: timm's name of the static network.
        plan: the plan's name, a key of :data:`kw.warehouse.PLANS`.
        settings: warehouse settings in place of the plan's, as :func:`kw.convert` takes them.
    """

    backbone: str
    plan: str
    settings: Mapping[str, float] = field(default_factory=dict)


def _ratios(cells: float, side: float = 1, **rest: float) -> dict[str, float]:
    """Budget b, and the share of the common channels that a cell's sides span."""
    sides = {"cell_inplane_ratio": side, "cell_outplane_ratio": side}
    return {"cell_num_ratio": cells, **sides, **rest}


_DEIT_TINY, _DEIT_SMALL = "deit_tiny_patch16_224", "deit_small_patch16_224"

PAPER_MODELS: dict[str, PaperModel] = {
    "kw_resnet18_1d4x": PaperModel("resnet18", "resnet18", _ratios(1 / 4, 1 / 2)),
    "kw_resnet18_1d2x": PaperModel("resnet18", "resnet18", _ratios(1 / 2, 1 / 2)),
    "kw_resnet18_1x": PaperModel("resnet18", "resnet18", _ratios(1)),
    "kw_resnet18_2x": PaperModel("resnet18", "resnet18", _ratios(2)),
    "kw_resnet18_4x": PaperModel("resnet18", "resnet18", _ratios(4)),
    "kw_resnet50_1d2x": PaperModel(
        "resnet50", "resnet50", _ratios(1 / 2, 1 / 2, nonlocal_basis_ratio=1 / 16)
    ),
    "kw_resnet50_1x": PaperModel("resnet50", "resnet50", _ratios(1)),
    "kw_resnet50_4x": PaperModel("resnet50", "resnet50", _ratios(4)),
    "kw_convnext_tiny_1x": PaperModel("convnext_tiny", "convnext_tiny", _ratios(1)),
    # MobileNetV2's budgets differ in layout, so that their plans hold the ratios.
    "kw_mobilenetv2_100_1d2x": PaperModel("mobilenetv2_100", "mobilenetv2_1d2x"),
    "kw_mobilenetv2_100_1x": PaperModel("mobilenetv2_100", "mobilenetv2_1x"),
    "kw_mobilenetv2_100_4x": PaperModel("mobilenetv2_100", "mobilenetv2_4x"),
    "kw_mobilenetv2_050_1d2x": PaperModel("mobilenetv2_050", "mobilenetv2_1d2x"),
    "kw_mobilenetv2_050_1x": PaperModel("mobilenetv2_050", "mobilenetv2_1x"),
    "kw_mobilenetv2_050_4x": PaperModel("mobilenetv2_050", "mobilenetv2_4x"),
    "kw_deit_tiny_1x": PaperModel(_DEIT_TINY, "deit", _ratios(1)),
    "kw_deit_tiny_4x": PaperModel(_DEIT_TINY, "deit", _ratios(4)),
    "kw_deit_small_1x": PaperModel(_DEIT_SMALL, "deit", _ratios(1)),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the KernelWarehouse models that match a pattern, e.g. ``"kw_resnet*_4x"``, sorted.

    After ``import kw`` and ``import timm``, ``timm.create_model`` builds them by these names.
    """
    return sorted(name for name in PAPER_MODELS if fnmatch(name, pattern))
