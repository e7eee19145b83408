"""mmdetection, imported after its operators are bound; no other module imports it."""

from __future__ import annotations

from typing import Any

from ..data.reading import DataError
from ..errors import one_line
from .annotations import ids_of, load_annotations
from .ops import bind

bind()

from mmdet.datasets import CocoDataset as _CocoDataset  # noqa: E402
from mmdet.datasets.api_wrappers import COCO  # noqa: E402
from mmdet.datasets.transforms import FixScaleResize as FixScaleResize  # noqa: E402
from mmdet.datasets.transforms import RandomShift as RandomShift  # noqa: E402
from mmdet.datasets.transforms import Rotate as Rotate  # noqa: E402
from mmdet.registry import MODELS as MODELS  # noqa: E402
from mmdet.utils import register_all_modules as register_all_modules  # noqa: E402


class _Loaded(COCO):
    """mmdetection's index of an annotation file."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.dataset = load_annotations(file)
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self, cat_names: Any = (), **_: Any) -> list[int]:
        """The ids in the order of ``cat_names``."""
        return ids_of(cat_names, self.dataset, "annotations")


class CocoDataset(_CocoDataset):
    """mmdetection's data set.

    A label is an index into ``metainfo.classes``, whatever the order of the file. If images without
    objects are left out, so are images whose objects are all left out.
    """

    COCOAPI = _Loaded

    def load_data_list(self) -> list[dict[str, Any]]:
        """Like mmdetection's.

        Raises:
            DataError: an annotation or an image lacks a value, or has a wrong one.
        """
        try:
            found: list[dict[str, Any]] = super().load_data_list()
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            what = f"{self.ann_file} cannot be read: {one_line(error)}"
            raise DataError(f"{what}; kw inspect annotations lists what is wrong") from error
        return found

    def filter_data(self) -> list[dict[str, Any]]:
        """Like mmdetection's, which also keeps images whose objects are all left out."""
        kept: list[dict[str, Any]] = super().filter_data()
        if not self.test_mode and (self.filter_cfg or {}).get("filter_empty_gt"):
            return [info for info in kept if info["instances"]]
        return kept
