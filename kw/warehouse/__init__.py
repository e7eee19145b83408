"""The method, on torch alone: cells, warehouses, attention, dynamic layers, plans, conversion."""

from .auto import AutoReport, auto_plan
from .conversion import Conversion, KeptWarehouse
from .convert import convert, drop_unused_warehouses, resolve_plan, set_backend
from .convertible import register_convertible
from .explain import LayerChoice, explain
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear
from .partition import KernelShape, partition_kernels
from .plan import Plan, Rule
from .plans import PLANS
from .same import KWConv2dSame
from .temperature import (
    anneal,
    annealed_temperature,
    find_warehouses,
    fold_temperature,
    get_temperature,
    has_temperature,
    set_temperature,
)
from .warehouse import Warehouse, WarehouseDict, WarehouseSettings

__all__ = [
    "PLANS",
    "AutoReport",
    "Conversion",
    "KWConv1d",
    "KWConv2d",
    "KWConv2dSame",
    "KWConv3d",
    "KWLayer",
    "KWLinear",
    "KeptWarehouse",
    "KernelShape",
    "LayerChoice",
    "Plan",
    "Rule",
    "Warehouse",
    "WarehouseDict",
    "WarehouseSettings",
    "anneal",
    "annealed_temperature",
    "auto_plan",
    "convert",
    "drop_unused_warehouses",
    "explain",
    "find_warehouses",
    "fold_temperature",
    "get_temperature",
    "has_temperature",
    "partition_kernels",
    "register_convertible",
    "resolve_plan",
    "set_backend",
    "set_temperature",
]
