"""mmdetection, once its operators are bound: the one place that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.reading import DataError
from ..errors import one_line
from .annotations import category_ids
from .ops import bind

bind()

from mmdet.datasets import CocoDataset as _CocoDataset  # noqa: E402
from mmdet.datasets.api_wrappers import COCO  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402

__all__ = ["MODELS", "CocoDataset", "register_all_modules"]


class _Loaded(COCO):
    """The content of an annotation file that is in memory already."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.dataset = content
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self, cat_names: Any = (), **_: Any) -> list[int]:
        """In the order of the names that are asked for, not of the file."""
        ids = category_ids(self.dataset, "annotations")
        return [ids[name] for name in cat_names]


class CocoDataset(_CocoDataset):
    """mmdetection's, of a file that is read already.

    A label is a place in ``metainfo.classes`` whatever the file's order. Where images without
    objects are left out, so are those whose objects are all left out.

    Args:
        content: of the annotation file, see :func:`kw.detection.annotations.load_annotations`.
        **settings: as mmdetection's.
    """

    def __init__(self, content: Mapping[str, Any], **settings: Any) -> None:
        self.COCOAPI = lambda _: _Loaded(content)
        super().__init__(**settings)
        del self.COCOAPI  # the content is not kept

    def load_data_list(self) -> list[dict[str, Any]]:
        """mmdetection's.

        Raises:
            DataError: an annotation or an image lacks something, or has a wrong value.
        """
        try:
            found: list[dict[str, Any]] = super().load_data_list()
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            what = f"{self.ann_file} cannot be read: {one_line(error)}"
            raise DataError(f"{what}; tools/check_coco.py lists what is wrong") from error
        return found

    def filter_data(self) -> list[dict[str, Any]]:
        """mmdetection's, which looks at what is listed, not at what is left."""
        kept: list[dict[str, Any]] = super().filter_data()
        if not self.test_mode and (self.filter_cfg or {}).get("filter_empty_gt"):
            return [info for info in kept if info["instances"]]
        return kept
