"""Detection and instance segmentation: mmdetection with KernelWarehouse backbones.

Importing this package makes ``import mmdet`` work without a compiled mmcv
(:mod:`kw.detection.ops`).
Annotation checks, evaluation and drawing need no mmdetection and are imported from their modules.
"""

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

from .ops import bind

if TYPE_CHECKING:
    from .backbone import Backbone
    from .config import load_detector_config
    from .pictures import write_pictures
    from .predictor import Predictor, load
    from .run import evaluate_checkpoint, train

__all__ = [
    "Backbone",
    "Predictor",
    "bind",
    "evaluate_checkpoint",
    "load",
    "load_detector_config",
    "train",
    "write_pictures",
]

_HOMES = {
    "Backbone": "backbone",
    "Predictor": "predictor",
    "load": "predictor",
    "load_detector_config": "config",
    "evaluate_checkpoint": "run",
    "train": "run",
    "write_pictures": "pictures",
}

if _find_spec("mmcv") is not None and _find_spec("mmdet") is not None:
    bind()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
