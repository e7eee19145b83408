"""Pictures of what a network and its training do (docs/visualizing.md).

The figures, as tensors and plain values, are here; their drawing is in the modules. Functions with
``draw`` in their names raise :class:`PictureError` where matplotlib is missing, others do without.
"""

from .cam import class_maps
from .coefficients import (
    PictureError,
    cell_shares,
    cell_use,
    class_effect,
    coefficients,
    dynamic_layers,
    measure_layer,
)
from .kernels import assembled_kernels

__all__ = [
    "PictureError",
    "assembled_kernels",
    "cell_shares",
    "cell_use",
    "class_effect",
    "class_maps",
    "coefficients",
    "dynamic_layers",
    "measure_layer",
]
