"""Training and testing: the trainer, what surrounds it, and classifiers on it."""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .checkpoint import CheckpointError, load_checkpoint, load_network
    from .finite import NonFiniteError
    from .run import build_trainer, set_contraction, train
    from .testing import Testing, evaluate_checkpoint, evaluate_checkpoints
    from .trained import Trained, load_trained

__all__ = [
    "CheckpointError",
    "NonFiniteError",
    "Testing",
    "Trained",
    "build_trainer",
    "evaluate_checkpoint",
    "evaluate_checkpoints",
    "load_checkpoint",
    "load_network",
    "load_trained",
    "set_contraction",
    "train",
]

__getattr__ = lazily(
    __name__,
    {
        "checkpoint": "CheckpointError load_checkpoint load_network",
        "finite": "NonFiniteError",
        "run": "build_trainer set_contraction train",
        "testing": "Testing evaluate_checkpoint evaluate_checkpoints",
        "trained": "Trained load_trained",
    },
)
