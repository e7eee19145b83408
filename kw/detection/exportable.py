"""Which detectors can be exported, and what becomes of a picture before their network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.ops import RoIAlign
from mmdet.datasets.transforms import PackDetInputs, Resize
from mmdet.models import SingleStageDetector, TwoStageDetector
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads import BBoxHead, FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, DistancePointBBoxCoder

from ..deploy.description import ExportError
from .data import LoadImage
from .predictor import Predictor

__all__ = ["check_detector", "preprocessing"]

_BY_FEAT = ("predict_by_feat", "_predict_by_feat_single")
_DENSE = ("predict", *_BY_FEAT, "_bbox_post_process")
_EXTRACTOR = ("forward", "map_roi_levels")
_NMS = {"type", "iou_threshold", "class_agnostic", "split_thr"}


def check_detector(predictor: Predictor) -> None:
    """Refuse a detector whose parts compute something else than :class:`.graph.DetectorGraph`.

    Raises:
        ExportError: with the part, and what is exported.
    """
    detector: Any = predictor.detector
    # Parts, and the functions of mmdetection that they must have unchanged.
    parts: list[tuple[str, Any, Any, Sequence[str]]]
    parts = [("data_preprocessor", detector.data_preprocessor, DetDataPreprocessor, ("forward",))]
    if not hasattr(detector, "roi_head"):
        parts += [
            ("", detector, SingleStageDetector, ("predict", "extract_feat")),
            ("bbox_head", getattr(detector, "bbox_head", None), BaseDenseHead, _DENSE),
        ]
        limits = [("test_cfg", detector.test_cfg)]
    else:
        roi = detector.roi_head
        parts += [
            ("", detector, TwoStageDetector, ("predict", "extract_feat")),
            ("rpn_head", getattr(detector, "rpn_head", None), RPNHead, _DENSE),
            ("roi_head", roi, StandardRoIHead, ("predict", "predict_bbox", "predict_mask")),
            ("roi_head.bbox_head", roi.bbox_head, BBoxHead, _BY_FEAT),
            ("roi_head.bbox_roi_extractor", roi.bbox_roi_extractor, SingleRoIExtractor, _EXTRACTOR),
        ]
        if predictor.has_masks:
            extractor = roi.mask_roi_extractor
            parts += [
                ("roi_head.mask_head", roi.mask_head, FCNMaskHead, _BY_FEAT),
                ("roi_head.mask_roi_extractor", extractor, SingleRoIExtractor, _EXTRACTOR),
            ]
        settings = detector.test_cfg
        limits = [("test_cfg.rpn", settings.rpn), ("test_cfg.rcnn", settings.rcnn)]
    for place, part, base, functions in parts:
        if not isinstance(part, base) or not _is_common(part, base, functions):
            raise _refusal(f"model.{place}".rstrip("."), type(part).__name__)
    for place, config in limits:
        nms = config.get("nms") or {}
        if nms.get("type") != "nms" or "iou_threshold" not in nms or not set(nms) <= _NMS:
            raise _refusal(f"model.{place}.nms", str(dict(nms)))
        for key in ("nms_pre", "max_per_img")[place == "test_cfg.rcnn" :]:
            if config.get(key, -1) < 1:
                raise _refusal(f"model.{place}.{key}", str(config.get(key)))
        # There it is compared after scaling to the picture.
        if place == "test_cfg" and config.get("min_bbox_size", -1) > 0:
            raise _refusal(f"model.{place}.min_bbox_size", str(config.min_bbox_size))


def _is_common(part: Any, base: Any, functions: Sequence[str]) -> bool:
    coder, layers = getattr(part, "bbox_coder", None), getattr(part, "roi_layers", ())
    return (
        all(getattr(type(part), name) is getattr(base, name) for name in functions)
        and (coder is None or type(coder) in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder))
        and not getattr(coder, "add_ctr_clamp", False)
        and not getattr(getattr(part, "loss_cls", None), "custom_cls_channels", False)
        and not getattr(part, "with_shared_head", False)
        and all(type(layer) is RoIAlign and layer.pool_mode == "avg" for layer in layers)
    )


def _refusal(place: str, found: str) -> ExportError:
    return ExportError(
        f"{place} = {found} cannot be exported: detectors of one stage with mmdetection's common "
        "choice of boxes (RetinaNet, FCOS, ATSS), and Faster and Mask R-CNN can, with nms of type "
        "'nms' and limits (nms_pre, max_per_img); kw predict and kw.load run the work directory"
    )


def preprocessing(predictor: Predictor) -> dict[str, Any]:
    """What becomes of a picture, as :class:`kw.deploy.detector.DetectorDescription` has it.

    Raises:
        ExportError: ``test_pipeline`` has a transform that an exported file does not.
    """
    first, *others = predictor.steps
    resize: dict[str, Any] = {"scale": None, "scale_factor": [1.0, 1.0], "keep_ratio": True}
    if not isinstance(first, LoadImage) or first.settings.to_float32:
        raise _step_refusal(first)
    for place, step in enumerate(others):
        if type(step) is Resize and place == 0 and step.interpolation == "bilinear":
            factor = step.scale_factor
            factor = [factor, factor] if isinstance(factor, (int, float)) else factor
            resize = {
                "scale": None if step.scale is None else list(step.scale),
                "scale_factor": None if step.scale is not None else list(factor),
                "keep_ratio": bool(step.keep_ratio),
            }
        elif type(step) is not PackDetInputs:
            raise _step_refusal(step)
    settings = predictor.detector.data_preprocessor
    normal = settings._enable_normalize
    return {
        "colour": "RGB" if settings._channel_conversion else "BGR",
        "exif_orientation": "apply" if predictor.upright else "ignore",
        "max_pixels": predictor.max_pixels,
        "resize": resize,
        "mean": settings.mean.flatten().tolist() if normal else [0.0] * 3,
        "std": settings.std.flatten().tolist() if normal else [1.0] * 3,
        "pad_to_multiple_of": settings.pad_size_divisor,
        "pad_value": settings.pad_value,
    }


def _step_refusal(step: Any) -> ExportError:
    return ExportError(
        f"test_pipeline: {type(step).__name__} cannot be exported: expected LoadImageFromFile, "
        "Resize (bilinear) and PackDetInputs, without settings that change the pixels otherwise"
    )
