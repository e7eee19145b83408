"""Training and testing on mmengine's Runner."""

from .checkpoint import CheckpointError, load_checkpoint, load_network
from .run import build_runner, evaluate_checkpoint, train

__all__ = [
    "CheckpointError",
    "build_runner",
    "evaluate_checkpoint",
    "load_checkpoint",
    "load_network",
    "train",
]
