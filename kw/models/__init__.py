"""Backbones, classifiers, and the names of the papers' models.

Imported when first used: the list of models needs neither timm nor mmengine.
"""

from typing import TYPE_CHECKING, Any

from .released import RELEASED, ReleasedModel, list_models

if TYPE_CHECKING:
    from .build import build_model, build_network, check_network, start_network
    from .classifier import ImageClassifier

__all__ = [
    "RELEASED",
    "ImageClassifier",
    "ReleasedModel",
    "build_model",
    "build_network",
    "check_network",
    "list_models",
    "start_network",
]


def __getattr__(name: str) -> Any:
    if name in ("build_model", "build_network", "check_network", "start_network"):
        from . import build

        return getattr(build, name)
    if name == "ImageClassifier":
        from .classifier import ImageClassifier

        return ImageClassifier
    raise AttributeError(f"module 'kw.models' has no attribute {name!r}")
