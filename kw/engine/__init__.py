"""Training and testing on mmengine's Runner."""

from .checkpoint import CheckpointError, load_checkpoint, load_network
from .finite import NonFiniteError
from .run import build_runner, evaluate_checkpoint, set_contraction, train

__all__ = [
    "CheckpointError",
    "NonFiniteError",
    "build_runner",
    "evaluate_checkpoint",
    "load_checkpoint",
    "load_network",
    "set_contraction",
    "train",
]
