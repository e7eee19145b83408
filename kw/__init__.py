"""KernelWarehouse: dynamic convolution with cells that layers share.

``kw.warehouse`` and ``kw.peers`` need torch alone; :func:`build_model` and :func:`load` bring in
timm when they are first used. Where timm is imported, before or after, ``timm.create_model`` knows
the models of :func:`list_models`.
"""

from typing import TYPE_CHECKING

from .lazy import lazily
from .models.timm_names import register_with_timm
from .version import __version__

if TYPE_CHECKING:
    from . import peers
    from .deploy import load
    from .models import build_model
    from .models.paper_models import list_models
    from .runs import train
    from .warehouse import convert, get_temperature, set_temperature

__all__ = [
    "__version__",
    "build_model",
    "convert",
    "get_temperature",
    "list_models",
    "load",
    "peers",
    "set_temperature",
    "train",
]

register_with_timm()

__getattr__ = lazily(
    __name__,
    {
        "deploy": "load",
        "models": "build_model",
        "models.paper_models": "list_models",
        "runs": "train",
        "warehouse": "convert get_temperature set_temperature",
        "": "peers",
    },
)
