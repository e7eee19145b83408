"""A trained detector for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import Compose, pseudo_collate

from ..config import ConfigError
from ..data.reading import BadImageError, Picture
from ..errors import UserError, memory_for, one_line
from ..objects.found import Detector, Found
from ..objects.run_lengths import encode_masks
from ..training import load_checkpoint, load_network, set_contraction
from ..training.checkpoint import CheckpointError
from ..training.trained import choose_weights, detector_config, trained_file
from .config import DetectorConfig, load_detector_config, without_weights
from .data import check_sample, with_our_reading
from .detector import build_detector, has_masks
from .mmdet import register_all_modules
from .sets import class_names

_PIPELINE = "test_pipeline"


class Predictor(Detector):
    """A trained detector, ready for pictures.

    Args:
        config: the detector, and how it reads pictures (``test_pipeline``).
        checkpoint: a file that training wrote.
        device: device to run on.
        weights: ``"model"``, ``"ema"``, or ``"auto"``: the moving average where there is one.

    Attributes:
        detector: mmdetection's.
        steps: the transforms of a picture.
        meta: the checkpoint's.
        weights: ``"model"`` or ``"ema"``.

    Raises:
        ConfigError: the detector cannot be built.
        CheckpointError: the checkpoint cannot be read or is of another detector.
        DataError: neither the checkpoint nor the training annotations give the categories.
    """

    def __init__(
        self,
        config: DetectorConfig,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        weights: str = "auto",
    ) -> None:
        state = load_checkpoint(checkpoint)
        data = config.run.data
        self.meta: dict[str, Any] = state.get("meta", {})
        self.classes = list(self.meta.get("classes") or class_names(data))
        self.config = config
        self.max_pixels = data.bad_images.max_pixels
        self.upright = data.exif_orientation == "apply"
        self.detector = build_detector(without_weights(config.model), self.classes)
        self.weights, chosen = choose_weights(state, checkpoint, weights)
        load_network(self.detector, chosen, str(checkpoint))
        set_contraction(config.run.contraction, self.detector)
        self.detector.to(device).eval()
        self.has_masks = has_masks(self.detector)
        register_all_modules(init_default_scope=True)
        # There are no annotations here.
        steps = [step for step in config.test_pipeline if not _reads_annotations(step)]
        try:
            transforms = Compose(steps).transforms
        except Exception as error:  # mmdetection raises any kind for wrong settings
            what = f"mmdetection cannot build it: {one_line(error)}"
            raise ConfigError(f"{_PIPELINE}: {what}") from error
        self.steps = with_our_reading(transforms, self.max_pixels, self.upright, _PIPELINE)

    @torch.no_grad()
    def find(self, picture: Picture, score: float = 0.0) -> Found:
        """The detections in one picture, see :meth:`predict`; a box that is not finite is none."""
        sample: Any = {"img_path": picture, "img_id": 0}
        name = picture if isinstance(picture, (str, Path)) else "a picture"
        with memory_for(lambda: [name]):
            try:
                for step in self.steps:
                    sample = step(sample)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # of transforms of mmdetection or the user
                what = f"{_PIPELINE} fails on it: {one_line(error)}"
                raise BadImageError.of(name, what) from error
            check_sample(sample, _PIPELINE)
            (found,) = self.detector.test_step(pseudo_collate([sample]))
            objects = found.pred_instances
            finite = objects.bboxes.isfinite().all(1)
            objects = objects[finite & (objects.scores >= score)]
            objects = objects[objects.scores.argsort(descending=True, stable=True)]
            masks = encode_masks(objects.masks) if self.has_masks else None
        height, width = found.ori_shape
        return Found(
            objects.bboxes.float().cpu(),
            objects.scores.float().cpu(),
            objects.labels.cpu(),
            masks,
            (width, height),
        )


def _reads_annotations(step: Any) -> bool:
    return isinstance(step, dict) and "LoadAnnotations" in str(step.get("type"))


def load(model: str | Path, device: str = "cpu", weights: str = "auto") -> Predictor:
    """The trained detector of a run, a work directory of ``kw train`` or a checkpoint in it;
    otherwise as :class:`Predictor`.

    Its ``config.py`` is run as a program: load only folders that you trust.

    Raises:
        CheckpointError: it is not a detector's, or as for :class:`Predictor`.
        ConfigError: its configuration cannot be used.
    """
    config = detector_config(model)
    if config is None:
        raise CheckpointError(
            f"{model}: expected a detector's work directory, with its config.py, or a checkpoint "
            "in it"
        )
    return Predictor(load_detector_config(config), trained_file(model), device, weights)
