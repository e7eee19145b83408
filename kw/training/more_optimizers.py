"""torch's and timm's optimizers, by their names in lower case; imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from timm.optim import get_optimizer_class, list_optimizers

from ..errors import one_line
from ..registry import OPTIMIZERS

# No optimizer; need a closure, sparse gradients, second derivatives.
_OTHER = {"Optimizer", "LBFGS", "SparseAdam", "adahessian"}


def _missing(error: Exception) -> Callable[..., Any]:
    def refuse(groups: Any, **_: Any) -> NoReturn:
        raise ImportError(f"its library is not installed ({one_line(error)})")

    return refuse


try:
    from . import muon as muon  # its forms, before torch's Muon, which takes matrices alone
except ImportError as error:
    OPTIMIZERS["muon"] = _missing(ImportError(f"{error}: pip install 'timm>=1.0.22'"))
for _name, _class in vars(torch.optim).items():
    is_optimizer = isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer)
    if is_optimizer and _name not in _OTHER:
        OPTIMIZERS.entries.setdefault(_name.lower(), _class)
for _known in map(str, list_optimizers()):
    if _known not in {*OPTIMIZERS.entries, *_OTHER}:
        try:
            OPTIMIZERS[_known] = get_optimizer_class(_known)
        except Exception as error:  # of a library that is not installed; timm asserts or raises
            OPTIMIZERS[_known] = _missing(error)
