"""Detection and instance segmentation: mmdetection with KernelWarehouse backbones.

Importing this package makes ``import mmdet`` work without a compiled mmcv
(:mod:`kw.detection.ops`). Annotation checks and evaluation do not need mmdetection and are imported
from their modules.
"""

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

from ..lazy import lazily
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

_misfit: ImportError | None = None
if _find_spec("mmcv") is not None and _find_spec("mmdet") is not None:
    try:
        bind()
    except ImportError as error:  # annotations and exported files do without
        _misfit = error

_parts = lazily(
    __name__,
    {
        "backbone": "Backbone",
        "config": "load_detector_config",
        "pictures": "write_pictures",
        "predictor": "Predictor load",
        "run": "evaluate_checkpoint train",
    },
)


def __getattr__(name: str) -> Any:
    if _misfit is not None and name in __all__:
        raise _misfit
    return _parts(name)
