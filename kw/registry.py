"""Registries of what a configuration can name, children of mmengine's.

A class that a user registers here is found by name in mmengine and mmdetection configurations as
``kw.NAME``.
"""

from mmengine.registry import HOOKS as _HOOKS
from mmengine.registry import LOOPS as _LOOPS
from mmengine.registry import MODELS as _MODELS
from mmengine.registry import OPTIM_WRAPPERS as _OPTIM_WRAPPERS
from mmengine.registry import Registry

__all__ = ["HOOKS", "LOOPS", "MODELS", "OPTIM_WRAPPERS"]

HOOKS = Registry("hook", parent=_HOOKS, scope="kw", locations=["kw.engine.hooks"])
LOOPS = Registry("loop", parent=_LOOPS, scope="kw", locations=["kw.engine.loops"])
MODELS = Registry("model", parent=_MODELS, scope="kw", locations=["kw.models.classifier"])
OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=_OPTIM_WRAPPERS, scope="kw", locations=["kw.engine.optim"]
)
