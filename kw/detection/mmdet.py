"""mmdetection, once its operators are bound: the one place that imports it."""

from __future__ import annotations

from typing import Any

from .ops import bind

bind()

from mmdet.datasets import CocoDataset as _CocoDataset  # noqa: E402
from mmdet.datasets.api_wrappers import COCO  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402

__all__ = ["MODELS", "CocoDataset", "register_all_modules"]


class _OrderedCoco(COCO):
    """Category ids in the order of the names that are asked for, not of the file."""

    def get_cat_ids(self, cat_names: Any = (), **others: Any) -> list[int]:
        ids = super().get_cat_ids(cat_names=list(cat_names), **others)
        place = {name: i for i, name in enumerate(cat_names)}
        return sorted(ids, key=lambda i: place[self.cats[i]["name"]]) if place else ids


class CocoDataset(_CocoDataset):
    """mmdetection's, whose labels are places in ``metainfo.classes`` whatever the file's order."""

    COCOAPI = _OrderedCoco
