"""The dynamic convolutions that the paper compares with, as conversions of static networks."""

from .condconv import CondConv2d, CondLinear
from .convert import convert
from .dyconv import DyConv2d
from .odconv import ODConv2d

__all__ = ["CondConv2d", "CondLinear", "DyConv2d", "ODConv2d", "convert"]
