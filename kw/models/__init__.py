"""Backbones, classifiers, and the names of the papers' models.

Imported when first used: the list of models needs no timm.
"""

from typing import TYPE_CHECKING

from ..lazy import lazily
from .paper_models import PAPER_MODELS, PaperModel, list_models

if TYPE_CHECKING:
    from .build import build_model, build_network, check_network, start_network
    from .classifier import ImageClassifier

__all__ = [
    "PAPER_MODELS",
    "ImageClassifier",
    "PaperModel",
    "build_model",
    "build_network",
    "check_network",
    "list_models",
    "start_network",
]


__getattr__ = lazily(
    __name__,
    {
        "build": "build_model build_network check_network start_network",
        "classifier": "ImageClassifier",
    },
)
