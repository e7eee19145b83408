"""The module that takes the place of mmcv's compiled extension."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import attention, deform_conv, focal_loss, nms, roi_align

__all__ = ["OPERATORS", "is_standin", "make_standin"]

_MODULES = (attention, deform_conv, focal_loss, nms, roi_align)
OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name) for module in _MODULES for name in module.__all__
}


class _StandIn(ModuleType):
    """A module with an attribute for every name; a missing operator fails when it is called."""

    def __getattr__(self, name: str) -> Any:
        # The import system and inspect ask for names with an underscore, which are no operators.
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return functools.partial(_fail, name)


class _Loader(Loader):
    """Returns the finished module. ``mmengine.utils.mmcv_full_available`` needs a loader, and
    parameter groups for deformable convolutions depend on its result."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is complete."""


def make_standin(name: str) -> ModuleType:
    """A module with our operators under mmcv's names, to be imported as ``name``."""
    module = _StandIn(name, __doc__)
    module.__spec__ = ModuleSpec(name, _Loader(module), origin=__name__)
    module.__loader__ = module.__spec__.loader
    for operator, function in OPERATORS.items():
        setattr(module, operator, _in_full_precision(function))
    for question in ("get_compiler_version", "get_compiling_cuda_version"):
        setattr(module, question, _not_compiled)  # for reports of the environment
    return module


def is_standin(module: ModuleType) -> bool:
    """Whether ``module`` is one that :func:`make_standin` made."""
    return isinstance(module, _StandIn)


def _not_compiled() -> str:
    return "none: torchvision's operators"


def _fail(name: str, *arguments: Any, **settings: Any) -> None:
    raise NotImplementedError(
        f"mmcv's operator {name!r} is not among those that kw.detection.ops provides "
        f"({', '.join(sorted(OPERATORS))}): choose a model that does without it, or install an "
        "mmcv that was compiled for this version of PyTorch"
    )


def _in_full_precision(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off, which would round the float32 values inside an operator."""

    @functools.wraps(operator)
    def without_autocast(*arguments: Any, **settings: Any) -> Any:
        device = _device_type(arguments)
        if not torch.amp.is_autocast_available(device):
            return operator(*arguments, **settings)
        with torch.autocast(device, enabled=False):
            return operator(*arguments, **settings)

    return without_autocast


def _device_type(arguments: Sequence[Any]) -> str:
    return next((a.device.type for a in arguments if isinstance(a, Tensor)), "cpu")
