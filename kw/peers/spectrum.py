"""Kernels in the frequency domain, and images in frequency bands, for FDConv.

Legend: R, C rows and columns of a matrix, H, W height and width of an image, B samples, n groups.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..torch_private import has_values, is_traced
from ..warehouse.ops import is_exporting

BANDS = (16, 8, 4)
"""Bands of an image's spectrum in octaves, end at 1/16, 1/8, 1/4 cycles a pixel; then the rest."""


def hartley(matrix: Tensor) -> Tensor:
    """Discrete Hartley transform of real matrices ``[..., R, C]``, orthonormal.

    ``H(u, v) = sum_pq x(p, q) cas(2 pi (u p / R + v q / C)) / sqrt(R C)``, cas = cos + sin: the
    real form of Fourier coefficients ``F``, ``H = Re F - Im F``. It is its own inverse.
    """
    spectrum = torch.fft.fft2(matrix, norm="ortho")
    return spectrum.real - spectrum.imag


def spectrum_parts(coefficients: Tensor) -> Tensor:
    """Hartley coefficients ``[R, C]`` as Fourier coefficients of half of the frequencies, which
    those of a real matrix follow from: real and imaginary parts ``[R, C // 2 + 1, 2]``."""
    opposite = coefficients.flip((0, 1)).roll((1, 1), (0, 1))  # at (-u, -v)
    half = coefficients.shape[1] // 2 + 1
    own, opposite = coefficients[:, :half], opposite[:, :half]
    return torch.stack(((own + opposite) / 2, (opposite - own) / 2), -1)


def scaled_inverse(parts: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Inverse transform ``[B, R, C]`` of Fourier coefficients (:func:`spectrum_parts`) that are
    scaled for every sample, by ``[B, R (C // 2 + 1) 2]``, equal at (u, v) and (-u, -v)."""
    spectrum = (parts.flatten() * scale).view(scale.shape[0], *parts.shape)
    size = (parts.shape[0], columns)
    return torch.fft.irfft2(torch.view_as_complex(spectrum), s=size, norm="ortho")


def frequency_groups(rows: int, columns: int, groups: int) -> Tensor:
    """The group of every coefficient of an ``[R, C]`` spectrum, from low to high frequencies.

    Coefficients are ordered by the norm of their frequency ``(u / R, v / C)``, u and v counted from
    -R / 2 and -C / 2, and cut into groups of equal size. Those of ``(u, v)`` and ``(-u, -v)``, one
    frequency of a real matrix, belong to one group.

    Returns:
        int64 ``[R, C // 2 + 1, 2]``: of the coefficients of :func:`spectrum_parts`.

    Raises:
        ValueError: fewer frequencies than groups.
    """
    u = torch.arange(rows, device="cpu").unsqueeze(1)
    v = torch.arange(columns, device="cpu")
    # Integers, so that ties are ties on every machine.
    near = (torch.minimum(u, rows - u) * columns).square()
    norm = near + (torch.minimum(v, columns - v) * rows).square()  # [R, C]
    own = u * columns + v
    first = torch.minimum(own, -u % rows * columns + -v % columns)  # of a frequency's two
    frequencies, index = first.unique(return_inverse=True)  # index [R, C]
    count = len(frequencies)
    if groups > count:
        raise ValueError(f"kernels is {groups}, but the kernel has {count} frequencies only")
    order = norm.flatten()[frequencies].sort(stable=True).indices
    group = torch.empty(count, dtype=torch.int64, device="cpu")
    group[order] = torch.arange(count, device="cpu") * groups // count
    return group[index][:, : columns // 2 + 1].unsqueeze(-1).repeat(1, 1, 2)


def low_passes(x: Tensor) -> list[Tensor]:
    """Images ``[B, I, H, W]`` without the frequencies of a limit or more, for :data:`BANDS`.

    The limits are on the larger of ``|u| / H`` and ``|v| / W``, so that rows and columns are
    filtered one after the other, by products with Fourier bases of the few frequencies that are
    left. For sizes of neural networks that is less work than Fourier transforms, exact at every
    size, and exports.
    """
    height, width = x.shape[-2:]
    if type(height) is not int or type(width) is not int:  # exported with its size open
        return [_filter(height, limit, x) @ (x @ _filter(width, limit, x)) for limit in BANDS]
    into_rows, into_columns = _basis(height, x), _basis(width, x)
    # [B, I, h, w]: coefficients below the last and largest limit; those of the others are corners.
    inner = into_rows.mT @ (x @ into_columns)
    results = []
    for limit in BANDS:
        rows, columns = into_rows[:, : _kept(height, limit)], into_columns[:, : _kept(width, limit)]
        part = inner[..., : rows.shape[1], : columns.shape[1]]
        results.append(rows @ (part @ columns.mT))
    return results


def _filter(size: int, limit: int, like: Tensor) -> Tensor:
    """``[size, size]``: what is left of a line below a limit."""
    place = torch.arange(size, device=like.device)
    count = place[-1:] + 1  # a tensor: exporters do not translate all operations with open sizes
    near = torch.minimum(place, count - place) * limit < count  # by frequency
    angle = _angle(place.unsqueeze(1) * place, count).to(torch.float32)
    both = [wave * near @ wave for wave in (angle.cos(), angle.sin())]
    return ((both[0] + both[1]) / count).to(like.dtype)


def _angle(steps: Tensor, count: Tensor) -> Tensor:
    """The angle of whole steps on a circle of so many; whole turns are left out before rounding."""
    turns = steps.to(torch.float64) / count
    return 2 * math.pi * (turns - turns.floor())


def _kept(size: int, limit: int) -> int:
    """Real coefficients of frequencies u with ``u / size < 1 / limit``: u = 0 and pairs."""
    return 2 * ((size + limit - 1) // limit) - 1


def _basis(size: int, like: Tensor) -> Tensor:
    """Orthonormal Fourier vectors ``[size, r]`` below the largest limit, by frequency."""
    if is_exporting() or is_traced() or not has_values(like):  # what these make must not be kept
        wide = torch.promote_types(like.dtype, torch.float32)
        return _waves(size, like.device, wide).to(like.dtype)
    return _fixed_basis(size).to(like)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # training reads it, too
def _fixed_basis(size: int) -> Tensor:
    return _waves(size, torch.device("cpu"), torch.float64)


def _waves(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    place = torch.arange(size, device=device).unsqueeze(1)
    index = torch.arange(_kept(size, BANDS[-1]), device=device)
    angle = _angle(place * ((index + 1) // 2), place[-1:] + 1).to(dtype)
    wave = torch.where(index % 2 == 1, angle.sin(), angle.cos())
    return wave / wave.square().sum(0).sqrt()
