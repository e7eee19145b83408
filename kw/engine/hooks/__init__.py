"""What happens around updates and epochs."""

from .checkpoint import CheckpointHook
from .ema import EmaHook
from .log import LogHook
from .schedule import ScheduleHook

__all__ = ["CheckpointHook", "EmaHook", "LogHook", "ScheduleHook"]
