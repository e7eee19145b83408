"""Weights as safetensors: tensors without code.

As in PyTorch's model zoo the name ends with the first eight digits of the file's SHA-256, which are
compared when the file is read: damage is found.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from ..errors import one_line
from ..hub import sha256
from .description import Description, ExportError

DIGITS = 8
FORMAT = {"format": "pt"}
"""What transformers and accelerate expect in a header, if there is one."""
_HASHED = re.compile(rf"-([0-9a-f]{{{DIGITS}}})\.safetensors$")


def write_weights(state: dict[str, Tensor], description: Description, path: Path) -> Path:
    """Write a network's state, with the description in the header, for ``NAME.safetensors`` as
    ``NAME-<first digits of its SHA-256>.safetensors``, which is returned."""
    from safetensors.torch import save

    # Copies: safetensors refuses tensors that share memory.
    header = {**FORMAT, **description.to_strings()}
    content = save({k: v.clone().contiguous() for k, v in state.items()}, header)
    digest = hashlib.sha256(content).hexdigest()[:DIGITS]
    target = path.with_name(f"{path.stem}-{digest}.safetensors")
    target.write_bytes(content)
    return target


def read_weights(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Read what :func:`write_weights` wrote.

    Raises:
        ExportError: it cannot be read, is damaged, or was not written here.
    """
    from safetensors import SafetensorError, safe_open

    expected = _HASHED.search(path.name)
    if expected is not None and (found := sha256(path)[:DIGITS]) != expected[1]:
        raise ExportError(
            f"{path}: is damaged: its SHA-256 begins with {found}, its name says {expected[1]}; "
            "copy it again"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError) as error:
        raise ExportError(f"{path}: cannot be read as safetensors: {one_line(error)}") from error
    return state, Description.from_strings(metadata, str(path))


def cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state with floating-point tensors in another type."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
