"""Other dynamic convolutions to compare with, as conversions of static networks."""

from .condconv import CondConv2d, CondLinear
from .convert import convert
from .dyconv import DyConv2d
from .fdconv import FDConv2d
from .kerneldna import DNAConv2d
from .odconv import ODConv2d

__all__ = ["CondConv2d", "CondLinear", "DNAConv2d", "DyConv2d", "FDConv2d", "ODConv2d", "convert"]
