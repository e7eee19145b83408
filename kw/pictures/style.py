"""Shared parts of pictures: the check for matplotlib, colours, sizes, saving.

Colours: signed values in matplotlib's ``RdBu_r`` (red positive, blue negative, white 0), amounts in
``viridis``, categories from Okabe and Ito's set: none of them relies on red against green.
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import writing
from .coefficients import PictureError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED, AMOUNT = "RdBu_r", "viridis"
OWN, LAYER, FOREIGN = "#0072b2", "#56b4e9", "#e69f00"
INK = "#303030"
SUFFIXES = (".pdf", ".png", ".svg")
_DPI = 120


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib, or with its LaTeX, by :class:`PictureError`, before other
    work is done."""
    try:
        import matplotlib as mpl
        import matplotlib.figure
    except (ImportError, ValueError) as error:  # ValueError: also of another NumPy's extensions
        # A notebook sets it for the processes that it starts, also in another environment.
        is_backend = "MPLBACKEND" in os.environ and "backend" in str(error)
        remedy = "unset MPLBACKEND" if is_backend else "pip install 'kernelwarehouse[demo]'"
        raise PictureError(
            f"pictures need matplotlib, which cannot be imported ({error}): {remedy}"
        ) from error
    if mpl.rcParams["text.usetex"]:
        raise PictureError(
            f"{mpl.matplotlib_fname()}: text.usetex is on, and labels have characters that LaTeX "
            "takes for commands: set it to False"
        )


def check_output(path: Path) -> None:
    """Refuse a name whose format is unknown, by :class:`PictureError`, before the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")


def new_figure(width: float, height: float, *title: str) -> Figure:
    """A figure of so many inches that needs no display, below lines of title, which are wrapped.

    Raises:
        PictureError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle("\n".join(wrap(line, width, size=9, most=3) for line in title), size=9)
    return figure


def wrap(text: str, inches: float, size: int = 8, most: int = 2) -> str:
    """A text in at most so many lines of this width; what does not fit ends in ``...``."""
    columns = _columns(inches, size)
    lines = textwrap.wrap(text, columns)
    if len(lines) > most:
        lines[most - 1 :] = [lines[most - 1][: columns - 3] + "..."]
    return _as_it_is("\n".join(lines))


def shorten(name: str, inches: float) -> str:
    """A file's name in one line; of one that does not fit, the end."""
    columns = _columns(inches, 8)
    return _as_it_is(name if len(name) <= columns else "..." + name[3 - columns :])


def _as_it_is(name: str) -> str:
    """A name for matplotlib, which takes what is between two ``$`` for a formula."""
    return name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def _columns(inches: float, size: int) -> int:
    return max(int(inches * 72 / (0.58 * size)), 6)  # a character's mean width, in sizes


def wrap_label(text: str, inches: float) -> str:
    """Every line of a label in at most two lines; a number at the end of a line is kept."""
    lines = []
    for line in text.splitlines():
        found = re.search(r" \d\.\d\d$", line)
        number = found[0] if found else ""
        lines.append(wrap(line.removesuffix(number), inches - 0.06 * len(number)) + number)
    return "\n".join(lines)


def show_image(axes: Any, image: Any, above: str = "", below: str = "") -> None:
    """An image, uint8 ``[H, W, 3]`` or grey ``[H, W]``, at the top of its place, without frame."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.spines[:].set_visible(False)
    axes.set_title(above, fontsize=8)
    axes.set_xlabel(below, fontsize=8)


def add_bar(figure: Any, image: Any, axes: Any, extend: str = "both", below: bool = False) -> Any:
    """A colour bar beside axes, or below them."""
    where = "horizontal" if below else "vertical"
    bar = figure.colorbar(image, ax=axes, extend=extend, orientation=where, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    if below:  # as many numbers as a short bar has room for
        from matplotlib.ticker import MaxNLocator

        bar.locator = MaxNLocator(4, symmetric=True)
        bar.update_ticks()
    return bar


def save(figure: Figure, path: Path) -> None:
    """Write a figure, into a folder that is made if need be; the same figure, the same bytes.

    Raises:
        PictureError: an unknown suffix, or it cannot be written.
    """
    import matplotlib as mpl

    check_output(path)
    # No date, no version, fixed identifiers.
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with writing(path, PictureError), mpl.rc_context({"svg.hashsalt": "kw.pictures"}):
        figure.savefig(path, dpi=_DPI, metadata=metadata[path.suffix.lower()])


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
    return max(float(np.quantile(flat.numpy(), quantile, method="inverted_cdf")), 1e-12)


def to_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Any:
    """Normalised images ``[B, C, H, W]`` as uint8 arrays ``[B, H, W, 3]``: the first three
    channels as RGB; the first one as grey where there are fewer.

    ``mean`` and ``std`` are :class:`kw.data.BatchPreprocessor`'s, in units of bytes.
    """
    bytes_ = (images.float() * std + mean).round().clamp(0, 255)
    bytes_ = bytes_[:, :3] if bytes_.shape[1] >= 3 else bytes_[:, :1].expand(-1, 3, -1, -1)
    return bytes_.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
