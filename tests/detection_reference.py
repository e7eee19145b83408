"""Detection operators by their definitions: plain loops, float64, gradients by autograd.

Written from the papers and from what mmcv documents of its conventions; nothing here calls an
operator of torchvision, mmcv or kw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def iou(a: Tensor, b: Tensor, offset: int) -> float:
    """Intersection over union of two boxes; widths count ``offset`` pixels more."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.tolist(), b.tolist()
    width = max(0.0, min(ax2, bx2) - max(ax1, bx1) + offset)
    height = max(0.0, min(ay2, by2) - max(ay1, by1) + offset)
    area_a = (ax2 - ax1 + offset) * (ay2 - ay1 + offset)
    area_b = (bx2 - bx1 + offset) * (by2 - by1 + offset)
    union = area_a + area_b - width * height
    return width * height / union if union else 0.0


def nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    threshold: float,
    sigma: float,
    min_score: float,
    method: str,
    offset: int,
) -> tuple[list[int], list[float]]:
    """Indices and new scores, in the order in which they are taken."""
    remaining = dict(enumerate(scores.tolist()))
    taken, values = [], []
    while remaining:
        best = max(remaining, key=lambda i: remaining[i])
        taken.append(best)
        values.append(remaining.pop(best))
        for i in list(remaining):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                remaining[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                remaining[i] *= 1 - overlap if method == "linear" else 0
            if remaining[i] < min_score:
                del remaining[i]
    return taken, values


def sigmoid_focal(x: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """``[N, C]``; ``-alpha_t (1 - p_t)^gamma log p_t`` of the paper, eq. 5, for every class."""
    rows = []
    for n in range(len(x)):
        for c in range(x.shape[1]):
            p = 1 / (1 + torch.exp(-x[n, c]))
            is_target = int(target[n]) == c
            p_t, alpha_t = (p, alpha) if is_target else (1 - p, 1 - alpha)
            rows.append(-alpha_t * (1 - p_t) ** gamma * torch.log(p_t))
    return torch.stack(rows).view(x.shape) if rows else x * 0


def _between(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear value at a point, ``[C]``; pixels that do not exist are zero."""
    total = image.new_zeros(len(image))
    y0, x0 = math.floor(y.item()), math.floor(x.item())
    for i in (y0, y0 + 1):
        for j in (x0, x0 + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                total = total + image[:, i, j] * (1 - (y - i).abs()) * (1 - (x - j).abs())
    return total


def roi_samples(
    image: Tensor, roi: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> list[list[list[Tensor]]]:
    """The samples, ``[C]`` each, of all bins of a region: rows, columns, samples row by row.

    A sample up to one pixel outside of the map has the value at the border, farther out it is zero.
    """
    x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in roi.tolist()[1:])
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    bin_h, bin_w = height / bins[0], width / bins[1]
    n_y, n_x = (ratio, ratio) if ratio else (math.ceil(bin_h), math.ceil(bin_w))
    result: list[list[list[Tensor]]] = []
    for p in range(bins[0]):
        result.append([])
        for q in range(bins[1]):
            samples = []
            for i in range(n_y):
                for j in range(n_x):
                    y = y1 + p * bin_h + (i + 0.5) * bin_h / n_y
                    x = x1 + q * bin_w + (j + 0.5) * bin_w / n_x
                    if -1 <= y <= image.shape[1] and -1 <= x <= image.shape[2]:
                        y = min(max(y, 0), image.shape[1] - 1)
                        x = min(max(x, 0), image.shape[2] - 1)
                        samples.append(_between(image, image.new_tensor(y), image.new_tensor(x)))
                    else:
                        samples.append(image.sum((1, 2)) * 0)
            result[-1].append(samples)
    return result


def roi_align(
    x: Tensor, rois: Tensor, bins: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Tensor:
    """``[R, C, *bins]``."""
    pooled = []
    for roi in rois:
        for row in roi_samples(x[int(roi[0])], roi, bins, scale, ratio, aligned):
            for samples in row:
                if samples:
                    pooled.append(torch.stack(samples).mean(0))
                else:
                    pooled.append(x[0].sum((1, 2)) * 0)
    return torch.stack(pooled).view(len(rois), *bins, x.shape[1]).permute(0, 3, 1, 2)


def deform_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    """A sum over kernel positions, each at its place plus an offset (y, x), times its mask."""
    batch, channels = x.shape[:2]
    c_out, c_group, k_h, k_w = weight.shape
    height, width = offset.shape[2:]
    outputs = []
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                columns = []
                for k in range(k_h * k_w):
                    values = []
                    for g in range(deform_groups):
                        at = 2 * (g * k_h * k_w + k)
                        y = i * stride[0] - padding[0] + k // k_w * dilation[0]
                        z = j * stride[1] - padding[1] + k % k_w * dilation[1]
                        part = x[b].chunk(deform_groups)[g]
                        value = _between(part, y + offset[b, at, i, j], z + offset[b, at + 1, i, j])
                        if mask is not None:
                            value = value * mask[b, g * k_h * k_w + k, i, j]
                        values.append(value)
                    columns.append(torch.cat(values))
                column = torch.stack(columns, 1).view(groups, channels // groups, k_h * k_w)
                kernels = weight.reshape(groups, c_out // groups, c_group, k_h * k_w)
                outputs.append((kernels * column[:, None]).sum((2, 3)).flatten())
    result = torch.stack(outputs).view(batch, height, width, c_out).permute(0, 3, 1, 2)
    return result if bias is None else result + bias[:, None, None]


def deform_attention(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """``[B, Q, M * D]``; locations are fractions of a map (x before y), pixel centres at halves."""
    batch, queries, heads, _, points, _ = locations.shape
    rows = []
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                total = value.new_zeros(value.shape[3])
                start = 0
                for level, (h, w) in enumerate(shapes):
                    image = value[b, start : start + h * w, m].T.reshape(-1, h, w)
                    start += h * w
                    for p in range(points):
                        x, y = locations[b, q, m, level, p]
                        sample = _between(image, y * h - 0.5, x * w - 0.5)
                        total = total + sample * weights[b, q, m, level, p]
                rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)
