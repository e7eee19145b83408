"""torch's and timm's optimizers, by their names in lower case; imported when one is asked for."""

from __future__ import annotations

from contextlib import suppress

import torch
from timm.optim import get_optimizer_class, list_optimizers

from ..registry import OPTIMIZERS

__all__: list[str] = []

_OTHER = {"Optimizer", "LBFGS", "SparseAdam"}  # no optimizer; need a closure, sparse gradients

for _name, _class in vars(torch.optim).items():
    is_optimizer = isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer)
    if is_optimizer and _name not in _OTHER:
        OPTIMIZERS.entries.setdefault(_name.lower(), _class)
for _known in map(str, list_optimizers()):
    if _known not in OPTIMIZERS.entries:
        with suppress(Exception):  # of a library that is not installed
            OPTIMIZERS[_known] = get_optimizer_class(_known)
