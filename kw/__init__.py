"""KernelWarehouse: dynamic convolution with cells that layers share.

``kw.warehouse`` and ``kw.peers`` need torch alone; :func:`build_model` and :func:`load` bring in
timm when they are first used. Where timm is imported, before or after, ``timm.create_model`` knows
the models of :func:`list_models`.
"""

from typing import TYPE_CHECKING, Any

from . import peers
from .models.registration import register_with_timm
from .models.released import list_models
from .version import __version__
from .warehouse import convert, get_temperature, set_temperature

if TYPE_CHECKING:
    from .deploy import load
    from .models import build_model

__all__ = [
    "__version__",
    "build_model",
    "convert",
    "get_temperature",
    "list_models",
    "load",
    "peers",
    "set_temperature",
]

register_with_timm()


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from .models import build_model

        return build_model
    if name == "load":
        from .deploy import load

        return load
    raise AttributeError(f"module 'kw' has no attribute {name!r}")
