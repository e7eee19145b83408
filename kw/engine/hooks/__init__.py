"""What happens around updates and epochs."""

from .bad_images import BadImageHook
from .checkpoint import CheckpointHook
from .ema import EmaHook
from .finite import FiniteHook
from .log import LogHook
from .pictures import PictureHook
from .schedule import ScheduleHook

__all__ = [
    "BadImageHook",
    "CheckpointHook",
    "EmaHook",
    "FiniteHook",
    "LogHook",
    "PictureHook",
    "ScheduleHook",
]
