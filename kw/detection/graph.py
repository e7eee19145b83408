"""A detector as one graph: network, boxes and suppression, with fixed numbers of rows; and which
detectors have one.

mmdetection's own code chooses boxes by their scores and loops over those that are left, which no
tracer follows. :class:`DetectorGraph` computes the same from mmdetection's parts (heads, anchors,
coders, extractors): every choice takes the best K, and rows without a choice have a score of -1.

Legend: H x W the padded image, A anchors of a level, C classes, K candidates, P proposals, N
detections, each a constant but H, W and A; h x w a mask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.datasets.transforms import PackDetInputs, Resize
from mmdet.models import SingleStageDetector, TwoStageDetector
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads import BBoxHead, FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import Tensor, nn

from ..deploy.description import ExportError
from ..warehouse import fold_temperature
from .data import LoadImage
from .predictor import Predictor

_BY_FEAT = ("predict_by_feat", "_predict_by_feat_single")
_DENSE = ("predict", *_BY_FEAT, "_bbox_post_process")
_EXTRACTOR = ("forward", "map_roi_levels")
_NMS = {"type", "iou_threshold", "class_agnostic", "split_thr"}
_NONE = -1.0  # the score of a row that is no detection; real ones are above 0
_PER_PROPOSAL = 4  # pairs of a proposal and a class that the last suppression sees, for a proposal


class DetectorGraph(nn.Module):
    """The detector to be traced: an image -> its detections.

    Args:
        detector: mmdetection's, of one or two stages; it is copied.
        nms: give detections; otherwise the candidates from which the last suppression chooses them.

    Attributes:
        deepest: pixels of the image per position of the deepest map. A map of one position would
            be traced as a constant.
    """

    def __init__(self, detector: Any, nms: bool = True) -> None:
        super().__init__()
        self.detector: Any = fold_temperature(copy.deepcopy(detector)).eval()
        self.two_stages = hasattr(detector, "roi_head")
        self.nms = nms
        head = detector.rpn_head if self.two_stages else detector.bbox_head
        self.deepest = int(max(max(pair) for pair in head.prior_generator.strides))
        self.config: Any = detector.test_cfg.rcnn if self.two_stages else detector.test_cfg

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Boxes ``[N, 4]``, scores ``[N]``, labels ``[N]`` and, of a detector of masks, the
        probabilities ``[N, h, w]`` of being inside, by falling score. Rows without a detection come
        last, with score -1.

        Args:
            image: ``[1, 3, H, W]``, normalised and padded.
            size: ``[2]``, height and width without padding.
        """
        maps = self.detector.extract_feat(image)
        if self.two_stages:
            proposals = self._proposals(maps, size)
            boxes, scores, labels = self._refined(maps, *proposals, size)
        else:
            threshold = self.config.get("score_thr", 0)
            found = _candidates(self.detector.bbox_head, maps, self.config, threshold, size)
            boxes, scores, labels, _ = found
        if not self.nms:
            return boxes, scores, labels
        boxes, scores, labels = _suppress(boxes, scores, labels, labels, self.config)
        if not (self.two_stages and self.detector.roi_head.with_mask):
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(maps, boxes, labels)

    def _proposals(self, maps: Any, size: Tensor) -> tuple[Tensor, Tensor]:
        """Regions ``[P, 4]`` and their scores."""
        config = self.detector.test_cfg.rpn
        found = _candidates(self.detector.rpn_head, maps, config, _NONE / 2, size)
        boxes, scores, labels, levels = found
        boxes, scores, _ = _suppress(boxes, scores, labels, levels, config)
        return boxes, scores

    def _refined(self, maps: Any, regions: Tensor, is_region: Tensor, size: Tensor) -> Any:
        """The best pairs of a proposal and a class: boxes ``[K, 4]``, scores and labels."""
        roi_head = self.detector.roi_head
        head = roi_head.bbox_head
        logits, deltas = head(_align(roi_head.bbox_roi_extractor, maps, regions))
        scores = logits.softmax(-1)[:, :-1]  # [P, C]
        valid = (scores > self.config.score_thr) & (is_region > _NONE)[:, None]
        count, classes = scores.shape
        scores, at = (
            torch.where(valid, scores, _NONE).flatten().topk(min(_PER_PROPOSAL, classes) * count)
        )
        place, labels = at // classes, at % classes
        deltas = deltas.view(count, -1, 4)  # [P, C or 1, 4]
        one = deltas[place, labels if deltas.shape[1] > 1 else torch.zeros_like(labels)]
        return _clip(head.bbox_coder, regions[place], one, size), scores, labels

    def _masks(self, maps: Any, boxes: Tensor, labels: Tensor) -> Tensor:
        roi_head = self.detector.roi_head
        logits = roi_head.mask_head(_align(roi_head.mask_roi_extractor, maps, boxes))
        own = torch.zeros_like(labels) if logits.shape[1] == 1 else labels
        return logits[torch.arange(len(boxes)), own].sigmoid()


def _candidates(head: Any, maps: Any, config: Any, threshold: float, size: Tensor) -> Any:
    """The best of every level of a dense head, as mmdetection's ``BaseDenseHead`` chooses them:
    boxes ``[K, 4]``, scores, labels and levels ``[K]``."""
    outputs = head(maps)
    shapes = [tuple(level.shape[-2:]) for level in outputs[0]]
    priors = head.prior_generator.grid_priors(shapes, dtype=size.dtype, device=size.device)
    found = []
    for level, (anchors, logits, deltas, *factor) in enumerate(zip(priors, *outputs, strict=True)):
        scores = _rows(logits, head.cls_out_channels)
        scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[:, :-1]
        classes = scores.shape[1]
        scores, at = _top(scores.flatten(), config.nms_pre)
        place = at // classes
        boxes = _clip(head.bbox_coder, anchors[place], _rows(deltas, 4)[place], size)
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = (scores > threshold) & (sides > config.get("min_bbox_size", -1)).all(1)
        if factor:
            scores = scores * _rows(factor[0], 1)[place, 0].sigmoid()
        scores = torch.where(valid, scores, _NONE)
        found.append((boxes, scores, at % classes, torch.full_like(at, level)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _rows(level: Tensor, columns: int) -> Tensor:
    """``[1, A' columns, y, x]`` -> ``[A, columns]``, in the order of the anchors."""
    return level[0].permute(1, 2, 0).reshape(-1, columns)


def _top(scores: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """The ``best`` scores and their places; where the number of scores is open, as many rows in
    any case."""
    count = scores.shape[0]
    if isinstance(count, int):
        return scores.topk(min(best, count))
    scores, at = F.pad(scores, (0, best), value=_NONE).topk(best)
    return scores, at.clamp(max=count - 1)


def _clip(coder: Any, anchors: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    boxes = coder.decode(anchors, deltas, max_shape=None)
    if not coder.clip_border:
        return boxes
    return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2))


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, groups: Tensor, config: Any) -> Any:
    """The best boxes, scores and labels after suppression within groups, as mmcv's
    ``batched_nms``; boxes of rows that are none are 0."""
    valid = scores > _NONE
    if not config.nms.get("class_agnostic", False):
        moved = boxes + (groups * (boxes.max() + 1))[:, None]
    else:
        moved = boxes
    # All that are none lie in one place, where the first suppresses the others at once.
    moved = torch.where(valid[:, None], moved, moved.new_tensor([-2.0, -2.0, -1.0, -1.0]))
    kept = torch.ops.torchvision.nms(moved, scores, config.nms.iou_threshold)
    left = torch.full_like(scores, _NONE).scatter(0, kept, scores[kept])
    scores, at = left.topk(min(config.max_per_img, len(left)))
    return torch.where((scores > _NONE)[:, None], boxes[at], 0.0), scores, labels[at]


def _align(extractor: Any, maps: Any, boxes: Tensor) -> Tensor:
    """RoIAlign ``[R, channels, h, w]`` of boxes ``[R, 4]``, each from the level of its size."""
    regions = F.pad(boxes, (1, 0))  # all of image 0
    levels = extractor.map_roi_levels(regions, extractor.num_inputs)
    total: Any = 0
    for level, layer in enumerate(extractor.roi_layers):
        here = levels == level
        # A region of another level is nothing here: it takes no samples.
        some = torch.where(here[:, None], regions, 0.0)
        found = torch.ops.torchvision.roi_align(
            maps[level], some, layer.spatial_scale, *layer.output_size, layer.sampling_ratio,
            layer.aligned,
        )  # fmt: skip
        total = total + found * here[:, None, None, None]
    return total


def check_detector(predictor: Predictor) -> None:
    """Refuse a detector whose parts compute something else than :class:`DetectorGraph`.

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
