"""mmdetection's detector, built from a configuration for the classes of the data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..config import ConfigError
from ..errors import UserError, one_line, say
from ..models.depth import decayed_rates
from ..training.hooks import Hook
from ..training.trainer import Trainer
from .backbone import Backbone
from .mmdet import MODELS, register_all_modules
from .schema import LayerDecayConfig

COCO = 80  # categories


def build_detector(model: dict[str, Any], classes: Sequence[str]) -> Any:
    """Build a detector with fresh heads. A message says where a backbone that starts from a
    classifier's weights gets other pixels than classifiers do.

    Args:
        model: settings for mmdetection's registry; ``num_classes`` of all heads is replaced.
        classes: category names.

    Returns:
        mmdetection's detector, initialised.

    Raises:
        ConfigError: mmdetection or the backbone refuses the settings, or the backbone's channels
            are not those of the neck.
        CheckpointError: the backbone's weights cannot be read or do not fit.
    """
    register_all_modules(init_default_scope=True)
    settings = _with_classes(copy.deepcopy(model), len(classes), "model")
    try:
        detector = MODELS.build(ConfigDict(settings))
        if isinstance(detector.backbone, Backbone):
            _check_channels(settings, detector.backbone)
            if detector.backbone.classifier is not None:
                _compare_pixels(*detector.backbone.classifier, detector.data_preprocessor)
        head: Any = getattr(detector, "bbox_head", None)
        if hasattr(head, "aux_reg_branches"):
            # As DDQ itself does when it trains: its checkpoints have names that it lacks before.
            detector.decoder.aux_reg_branches = head.aux_reg_branches
        detector._dump_init_info = lambda: None  # it logs a line for every parameter
        detector.init_weights()
        del detector._dump_init_info
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of any kind, for wrong settings and files that it cannot load
        raise ConfigError(f"model: mmdetection cannot build it: {one_line(error)}") from error
    detector.dataset_meta = {"classes": tuple(classes)}
    return detector


class WithLosses(nn.Module):
    """mmdetection's detector for training: a batch of the training loader -> losses by name.

    As in mmdetection, ``loss`` is the sum of those with "loss" in their names.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Losses, scalars; lists of losses by level are summed."""
        inputs = self.detector.data_preprocessor(batch, True)
        total, parts = self.detector.parse_losses(self.detector(**inputs, mode="loss"))
        return {**parts, "loss": total}


class EpochInfo(Hook):
    """Gives mmdetection's models epoch and iteration: some losses and image sizes depend on it."""

    def __init__(self) -> None:
        self._hub = MessageHub.get_current_instance()

    def before_training(self, trainer: Trainer) -> None:
        self._hub.update_info("max_epochs", trainer.config.epochs)
        self._hub.update_info("max_iters", trainer.schedule.total_updates)
        self._hub.update_info("iter", trainer.update)

    def before_epoch(self, trainer: Trainer) -> None:
        self._hub.update_info("epoch", trainer.epoch)

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        self._hub.update_info("iter", trainer.update)


def keep_maps_exact(detector: Any) -> None:
    """Give feature maps to the heads in float32, for training under autocast.

    mmdetection rounds the corners of regions to the type of the maps: in bf16, at 1,000 pixels, by
    up to 2 pixels. Convolutions of the heads still run in 16 bit.
    """
    last = detector.neck if getattr(detector, "with_neck", False) else detector.backbone
    last.register_forward_hook(_to_float32)


def _to_float32(module: nn.Module, inputs: Any, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(map_.float() for map_ in maps)


def has_masks(detector: Any) -> bool:
    """Whether the detector predicts instance masks."""
    # The heads of RTMDet-Ins and Mask2Former show by their loss alone that they do.
    by_loss = any(hasattr(part, "loss_mask") for part in detector.modules())
    return by_loss or bool(getattr(detector, "with_mask", False))


def lr_scales(detector: Any, decay: LayerDecayConfig | None) -> dict[str, float]:
    """Factors on the learning rate by parameter name; empty without layer decay.

    Raises:
        ConfigError: the backbone is mmdetection's, whose blocks are not known.
    """
    if decay is None:
        return {}
    backbone: nn.Module = getattr(detector, "backbone", detector)
    if not isinstance(backbone, Backbone):
        raise ConfigError(
            "optimizer.layer_decay: expected null for a backbone of mmdetection's own"
        )
    rates = decayed_rates(backbone.network, decay.rate, decay.blocks)
    return {f"backbone.network.{name}": scale for name, scale in rates.items()}


def _with_classes(settings: Any, classes: int, key: str) -> Any:
    """Set the number of classes of the heads, except for region proposals, which have none; a
    message names the numbers that are replaced, but COCO's, which mmdetection's files have."""
    if isinstance(settings, list):
        return [_with_classes(item, classes, f"{key}[{i}]") for i, item in enumerate(settings)]
    if not isinstance(settings, dict):
        return settings
    made: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("num_classes", "num_things_classes"):
            if value not in (classes, COCO):
                say(f"{key}.{name} = {value!r} is not used: the data have {classes} categories")
            made[name] = classes
        elif name == "num_stuff_classes" and value != 0:
            raise ConfigError(f"{key}.{name} = {value!r}: expected 0: the data have objects alone")
        elif name == "class_weight" and isinstance(value, list):
            # Mask2Former's: all alike, and one for no object.
            is_of_coco = value == value[:1] * COCO + value[-1:]
            made[name] = value[:1] * classes + value[-1:] if is_of_coco else value
        elif name in ("backbone", "rpn_head"):
            made[name] = value
        else:
            made[name] = _with_classes(value, classes, f"{key}.{name}")
    return made


def _compare_pixels(source: str, pixels: Any, preprocessor: Any) -> None:
    """Several of mmdetection's models, RTMDet and YOLOX among them, take BGR or bytes."""
    wanted = torch.tensor(pixels or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)) * 255
    given = torch.tensor([[0.0] * 3, [1.0] * 3])
    if getattr(preprocessor, "_enable_normalize", False):
        given = torch.stack([preprocessor.mean.flatten(), preprocessor.std.flatten()])
    is_rgb = getattr(preprocessor, "_channel_conversion", False)
    is_other = pixels is not None and (given - wanted).abs().max() > 1
    if not is_rgb or given[1].min() < 2 or is_other:
        mean, std = ([round(value, 3) for value in row] for row in wanted.tolist())
        say(
            f"{source}: trained on RGB with mean={mean}, std={std}"
            f"{'' if pixels else ', as most classifiers'}; model.data_preprocessor gives "
            f"{'RGB' if is_rgb else 'BGR'} with mean={given[0].tolist()}, std={given[1].tolist()}: "
            "set mean, std and bgr_to_rgb to what the weights know"
        )


def _check_channels(settings: dict[str, Any], backbone: Backbone) -> None:
    neck = settings.get("neck")
    first = neck[0] if isinstance(neck, list) else neck
    if not isinstance(first, dict) or "in_channels" not in first:
        return
    expected, found = backbone.out_channels, first["in_channels"]
    if list(found if isinstance(found, (list, tuple)) else [found]) != expected:
        raise ConfigError(
            f"model.neck.in_channels = {list(found)}: expected {expected}, the channels of the "
            f"backbone's maps (strides {backbone.strides})"
        )
