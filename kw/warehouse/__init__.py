"""The method, on torch alone: cells, warehouses, attention, dynamic layers, plans, conversion."""

from .convert import convert, drop_unused_warehouses, resolve_plan, set_backend
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear
from .partition import KernelShape, partition_kernels
from .plan import Plan, Rule
from .plans import PLANS
from .temperature import (
    annealed_temperature,
    find_warehouses,
    get_temperature,
    has_temperature,
    set_temperature,
)
from .warehouse import Warehouse, WarehouseDict, WarehouseSettings

__all__ = [
    "PLANS",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLayer",
    "KWLinear",
    "KernelShape",
    "Plan",
    "Rule",
    "Warehouse",
    "WarehouseDict",
    "WarehouseSettings",
    "annealed_temperature",
    "convert",
    "drop_unused_warehouses",
    "find_warehouses",
    "get_temperature",
    "has_temperature",
    "partition_kernels",
    "resolve_plan",
    "set_backend",
    "set_temperature",
]
