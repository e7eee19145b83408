"""mmdetection without a compiled mmcv: its operators, by torchvision's compiled ones and torch.

mmcv's extension does not compile beside current PyTorch, and mmdetection does not import without
it. :func:`bind` puts a module of our own in its place. Importing this package does nothing yet.
"""

from .binding import Binding, bind

__all__ = ["Binding", "bind"]
