"""What happens around updates and epochs."""

from .checkpoint import CheckpointHook, latest_checkpoint
from .ema import EmaHook
from .log import LogHook
from .schedule import ScheduleHook

__all__ = ["CheckpointHook", "EmaHook", "LogHook", "ScheduleHook", "latest_checkpoint"]
