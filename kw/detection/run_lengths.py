"""Masks as run lengths, COCO's compressed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["are_run_lengths", "decompress", "encode_masks", "import_evaluator"]


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """Compress masks: a few hundred bytes each, where a bool mask has one per pixel.

    Args:
        masks: ``[N, H, W]``, tensor on any device or array; nonzero is inside.

    Returns:
        N of ``{"size": [H, W], "counts": bytes}``.
    """
    mask_api = import_evaluator().mask
    if not isinstance(masks, torch.Tensor):
        masks = torch.as_tensor(np.asarray(masks))
    if masks.ndim != 3:
        raise ValueError(f"masks must be [N, H, W], not {list(masks.shape)}")
    if masks.shape[0] == 0:
        return []
    # Run lengths go down columns; turned on the device, which is quick there.
    columns = (masks != 0).transpose(1, 2).contiguous().to(torch.uint8).cpu().numpy()  # [N, W, H]
    return list(mask_api.encode(columns.T))


def decompress(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed form, None if it is not that.

    A number is sent in groups of five bits, the lowest first, each as one character from "0" on
    with a sixth bit if more follow. From the fourth number on, it is the difference to the one
    before the last.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return None if shift else counts


def are_run_lengths(masks: Any) -> bool:
    """Whether masks are already compressed."""
    return isinstance(masks, (list, tuple)) and all(isinstance(mask, Mapping) for mask in masks)


def import_evaluator() -> Any:
    """faster_coco_eval.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ImportError(
            "COCO's figures are computed by faster-coco-eval, which is not installed: "
            "pip install 'kernelwarehouse[detection]'"
        ) from error
    return faster_coco_eval
