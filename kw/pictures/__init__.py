"""Pictures of what a network and its training do (docs/visualizing.md).

First the figures, as tensors and plain values, then their drawing: a module's functions without
``draw`` in their names can be used without matplotlib.
"""

from .batches import draw_batch, label_mixture
from .cam import ClassMaps, class_maps, draw_cam
from .cells import draw_cells
from .coefficients import (
    CellShares,
    CellUse,
    DynamicLayer,
    LayerMeasure,
    PictureError,
    cell_shares,
    cell_use,
    class_effect,
    coefficients,
    dynamic_layers,
    measure_layer,
)
from .heatmaps import draw_attention, draw_classes
from .history import Snapshot, draw_history
from .kernels import assembled_kernels, draw_kernels
from .method import draw_mixing, draw_partition
from .outcomes import draw_confusion, draw_reliability, most_confused
from .samples import few_of_each, read_images, spaced
from .schedules import Curves, draw_schedules
from .style import check_matplotlib, check_output, save, to_pixels, to_tensor

__all__ = [
    "CellShares",
    "CellUse",
    "ClassMaps",
    "Curves",
    "DynamicLayer",
    "LayerMeasure",
    "PictureError",
    "Snapshot",
    "assembled_kernels",
    "cell_shares",
    "cell_use",
    "check_matplotlib",
    "check_output",
    "class_effect",
    "class_maps",
    "coefficients",
    "draw_attention",
    "draw_batch",
    "draw_cam",
    "draw_cells",
    "draw_classes",
    "draw_confusion",
    "draw_history",
    "draw_kernels",
    "draw_mixing",
    "draw_partition",
    "draw_reliability",
    "draw_schedules",
    "dynamic_layers",
    "few_of_each",
    "label_mixture",
    "measure_layer",
    "most_confused",
    "read_images",
    "save",
    "spaced",
    "to_pixels",
    "to_tensor",
]
