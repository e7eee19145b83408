"""What pictures have in common: matplotlib where it is there, colours, sizes, saving.

Colours: signed values in matplotlib's ``RdBu_r`` (red positive, blue negative, white 0), amounts in
``viridis``, categories from Okabe and Ito's set; none of them needs red to be told from green.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .coefficients import PictureError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AMOUNT",
    "FOREIGN",
    "INK",
    "LAYER",
    "OWN",
    "SIGNED",
    "SUFFIXES",
    "check_matplotlib",
    "check_output",
    "few_ticks",
    "new_figure",
    "save",
    "signed_limit",
    "to_pixels",
    "to_tensor",
]

SIGNED, AMOUNT = "RdBu_r", "viridis"
OWN, LAYER, FOREIGN = "#0072b2", "#56b4e9", "#e69f00"
INK = "#303030"
SUFFIXES = (".pdf", ".png", ".svg")
_DPI = 120


def check_matplotlib() -> None:
    """Refuse to draw where there is nothing to draw with, before the work and not after.

    Raises:
        PictureError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PictureError(
            f"pictures need matplotlib, which cannot be imported ({error}): "
            "pip install 'kernelwarehouse[demo]'"
        ) from error


def check_output(path: Path) -> None:
    """Refuse a name whose format is unknown, before the work.

    Raises:
        PictureError: an unknown suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"--out {path}: expected a name that ends in {', '.join(SUFFIXES)}")


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size, inches, that needs no display.

    Raises:
        PictureError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure, into a folder that is made if need be; the same figure, the same bytes.

    Raises:
        PictureError: an unknown suffix, or it cannot be written.
    """
    import matplotlib as mpl

    check_output(path)
    # No date, no version, fixed identifiers.
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "kw.pictures"}):
            figure.savefig(path, dpi=_DPI, metadata=metadata[path.suffix.lower()])
    except OSError as error:
        raise PictureError(f"--out {path}: cannot be written: {error.strerror}") from error


def few_ticks(bar: Any) -> None:
    """Leave a short colour bar the numbers that it has room for."""
    from matplotlib.ticker import MaxNLocator

    bar.ax.tick_params(labelsize=7)
    bar.locator = MaxNLocator(4, symmetric=True)
    bar.update_ticks()


def to_tensor(figure: Figure) -> Tensor:
    """A figure's pixels, uint8 ``[3, H, W]``, as TensorBoard takes them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)


def signed_limit(*values: Tensor, quantile: float = 1.0) -> float:
    """The end of a scale around 0: the largest absolute value, or a quantile of them; above 0."""
    flat = torch.cat([value.detach().abs().flatten().double() for value in values])
    if quantile < 1:
        place = max(int(np.ceil(quantile * len(flat))), 1)
        return max(float(flat.kthvalue(place).values), 1e-12)
    return max(float(flat.max()), 1e-12)


def to_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Any:
    """Normalised images ``[B, 3, S, S]`` as uint8 arrays ``[B, S, S, 3]``.

    Args:
        images: as the network takes them.
        mean: :class:`kw.data.BatchPreprocessor`'s, in units of bytes.
        std: likewise.
    """
    bytes_ = (images.float() * std + mean).round().clamp(0, 255)
    return bytes_.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
