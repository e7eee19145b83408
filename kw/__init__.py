"""KernelWarehouse: dynamic convolution with cells that layers share.

``kw.warehouse`` and ``kw.peers`` need torch alone; :func:`build_model` brings in timm when it is
first called.
"""

from typing import TYPE_CHECKING, Any

from . import peers
from .version import __version__
from .warehouse import convert, get_temperature, set_temperature

if TYPE_CHECKING:
    from .models import build_model

__all__ = ["__version__", "build_model", "convert", "get_temperature", "peers", "set_temperature"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from .models import build_model

        return build_model
    raise AttributeError(f"module 'kw' has no attribute {name!r}")
