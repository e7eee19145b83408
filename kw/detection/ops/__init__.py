"""mmcv's operators by torchvision and PyTorch, for mmdetection without a compiled mmcv.

mmcv's extension does not compile with current PyTorch, and mmdetection cannot be imported without
it. :func:`bind` installs a module of this project in its place; importing this package does not.
"""

from .binding import Binding, bind

__all__ = ["Binding", "bind"]
