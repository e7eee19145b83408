"""What happens around updates and epochs."""

from .bad_images import BadImageHook
from .base import Hook
from .finite import FiniteHook
from .log import LogHook
from .loggers import LoggerHook
from .progress import ProgressHook
from .rates import RatesHook

__all__ = [
    "BadImageHook",
    "FiniteHook",
    "Hook",
    "LogHook",
    "LoggerHook",
    "ProgressHook",
    "RatesHook",
]
