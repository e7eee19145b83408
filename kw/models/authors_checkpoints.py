"""The authors' released checkpoints, under this project's names.

Source: github.com/OSVAI/KernelWarehouse. Their networks are copies of torchvision's ResNet and
MobileNetV2 and of the original ConvNeXt; ours are timm's. What differs is

- the names of modules: the rules of :data:`FAMILIES`;
- the cells: ``warehouse_manager.weights.K`` is ``[n, c_out, c_in, *kernel]``, ours is
  ``LAYER.warehouse.weight``, two-dimensional, where LAYER is the first layer of the warehouse;
  both number warehouses alike;
- axes of size one: ConvNeXt's LayerScale is ``[1, C, 1, 1]`` in their converted networks;
- the temperature: theirs is a number that is not saved, ours a buffer; it is 0 after training.

A checkpoint is translated as a whole or refused; the error lists all keys that do not fit.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..warehouse import find_warehouses

MODEL_KEYS = ("model", "state_dict")
AVERAGE_KEYS = ("model_ema", "state_dict_ema")
_CELLS = re.compile(r"warehouse_manager\.weights\.(\d+)")
_SHOWN = 10  # differences of one kind that a message lists

Rules = tuple[tuple[str, str], ...]


class AuthorsFileError(UserError):
    """A released checkpoint cannot be read, or is of another network."""


@dataclass(frozen=True)
class Family:
    """How one of their backbones names its modules."""

    models: str  # regular expression of timm's names of the networks that it fits
    # (pattern, replacement) pairs for re.sub, applied in order to the start of every key
    rules: Rules

    def fits(self, model: str) -> bool:
        """Whether it is the family of a timm model, with or without a tag of pretrained weights."""
        return re.fullmatch(self.models, model.partition(".")[0]) is not None

    def rename(self, key: str) -> str:
        """Our name of one of their keys (keys of cells are translated elsewhere)."""
        for pattern, replacement in self.rules:
            key = re.sub(rf"\A{pattern}", replacement, key)
        return key


def _mobilenet_rules(depths: tuple[int, ...]) -> Rules:
    """Their ``features`` number all blocks; timm groups them in stages of ``depths`` blocks."""
    names = [f"blocks.{stage}.{i}." for stage, depth in enumerate(depths) for i in range(depth)]
    last = len(names) + 1
    return (
        (r"features\.0\.0\.", "conv_stem."),
        (r"features\.0\.1\.", "bn1."),
        (rf"features\.{last}\.0\.", "conv_head."),
        (rf"features\.{last}\.1\.", "bn2."),
        *((rf"features\.{number}\.", name) for number, name in enumerate(names, 1)),
        # The first block does not expand: depthwise and pointwise only.
        (r"(blocks\.0\.0)\.conv\.0\.0\.", r"\1.conv_dw."),
        (r"(blocks\.0\.0)\.conv\.0\.1\.", r"\1.bn1."),
        (r"(blocks\.0\.0)\.conv\.1\.", r"\1.conv_pw."),
        (r"(blocks\.0\.0)\.conv\.2\.", r"\1.bn2."),
        (r"(blocks\.\d+\.\d+)\.conv\.0\.0\.", r"\1.conv_pw."),
        (r"(blocks\.\d+\.\d+)\.conv\.0\.1\.", r"\1.bn1."),
        (r"(blocks\.\d+\.\d+)\.conv\.1\.0\.", r"\1.conv_dw."),
        (r"(blocks\.\d+\.\d+)\.conv\.1\.1\.", r"\1.bn2."),
        (r"(blocks\.\d+\.\d+)\.conv\.2\.", r"\1.conv_pwl."),
        (r"(blocks\.\d+\.\d+)\.conv\.3\.", r"\1.bn3."),
        # Dropout comes before it in some; a dynamic linear layer wraps a convolution.
        (r"classifier(\.1)?(\.conv)?\.", "classifier."),
    )


FAMILIES: dict[str, Family] = {
    "ResNet": Family(r"resnet\d+", ()),
    "MobileNetV2": Family(r"mobilenetv2_\d+", _mobilenet_rules((1, 2, 3, 4, 3, 3, 1))),
    "ConvNeXt": Family(
        r"convnext_(tiny|small|base|large)",
        (
            (r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"(stages\.\d+\.blocks\.\d+)\.dwconv\.", r"\1.conv_dw."),
            (r"(stages\.\d+\.blocks\.\d+)\.pwconv(\d)\.", r"\1.mlp.fc\2."),
            (r"downsample_layers\.0\.", "stem."),
            (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"head\.", "head.fc."),
            (r"norm\.", "head.norm."),
        ),
    ),
}


@dataclass(frozen=True)
class Weights:
    """What a released file holds."""

    # the network's state by their names, None where only an average is there
    model: dict[str, Tensor] | None
    average: dict[str, Tensor] | None  # the state of its moving average, where there is one
    epoch: int | None  # epochs trained, where the file says so


def read_authors_file(path: str | Path) -> Weights:
    """Read a released file to the CPU, running no code of its own.

    Looks through ``model``, ``state_dict``, ``model_ema`` and the prefix ``module.``.

    Raises:
        AuthorsFileError: there is no such file, it is damaged, it holds more than tensors, plain
            types and ``argparse.Namespace``, or no network's state is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise AuthorsFileError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type of error depends on where the file is damaged
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise AuthorsFileError(
                f"{path}: holds {refused[1]}, which is neither a tensor nor a plain type nor "
                "argparse.Namespace; nothing was loaded"
            ) from None
        raise AuthorsFileError(f"{path}: cannot be read: {one_line(error)}") from error
    model, average = _find_state(content, MODEL_KEYS), None
    if isinstance(content, Mapping):
        average = next((s for key in AVERAGE_KEYS if (s := _find_state(content.get(key)))), None)
    if model is None and average is None:
        found = type(content).__name__
        if isinstance(content, Mapping):
            found = ", ".join(map(str, list(content)[:_SHOWN])) or "nothing"
        raise AuthorsFileError(
            f"{path}: no network's state in it; expected tensors by name, or those under "
            f"{', '.join(MODEL_KEYS + AVERAGE_KEYS)}; found {found}"
        )
    epoch = content.get("epoch")
    return Weights(model, average, epoch if isinstance(epoch, int) else None)


def translate(
    state: Mapping[str, Tensor], network: nn.Module, model: str, source: str
) -> dict[str, Tensor]:
    """A released state under the names of one of our networks; complete, or an error.

    Args:
        state: tensors by the authors' names.
        network: the network to load it into, on any device; it is not changed.
        model: its name in timm, which determines the family.
        source: name of the state in messages.

    Returns:
        A state for ``network.load_state_dict``, complete, at temperature 0.

    Raises:
        AuthorsFileError: the authors released no such network, or the state is of another one; the
            message lists missing, unexpected and mis-shaped keys.
    """
    own = network.state_dict()
    paths = {warehouse: path for path, warehouse in network.named_modules()}
    warehouses = [(paths[warehouse], warehouse) for warehouse in find_warehouses(network)]
    renamed = dict(_rename(state, _family_of(model), [name for name, _ in warehouses]))
    temperatures = {f"{name}.temperature" for name, _ in warehouses}
    cell_shapes = {
        f"{name}.weight": [warehouse.partition.cells, *warehouse.partition.cell_shape]
        for name, warehouse in warehouses
    }
    translated, missing, misshaped, unused = {}, [], [], dict(renamed)
    for name, target in own.items():
        if name in temperatures:
            translated[name] = torch.zeros(target.shape, dtype=target.dtype)
            continue
        if name not in renamed:
            missing.append(name)
            continue
        theirs = unused.pop(name)
        value = state[theirs]
        shape = cell_shapes.get(name, list(target.shape))
        # Cells count and channels in their order; a linear layer's have one spatial axis, not two.
        axes = 3 if name in cell_shapes else 0
        same = list(value.shape[:axes]) == shape[:axes]
        if not same or _without_ones(value.shape) != _without_ones(shape):
            misshaped.append(f"{theirs} is {list(value.shape)}, {name} is {shape}")
            continue
        translated[name] = value.reshape(target.shape).to(target.dtype)
    unexpected = list(unused.values())
    # Check cells first: their shapes identify the network best.
    misshaped.sort(key=lambda difference: _CELLS.match(difference) is None)
    if missing or unexpected or misshaped:
        kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
        lists = "\n".join(f"  {kind} ({len(k)}): {_list(k)}" for kind, k in kinds.items() if k)
        raise AuthorsFileError(f"{source} is not of this configuration's network:\n{lists}")
    return translated


def _family_of(model: str) -> Family:
    for family in FAMILIES.values():
        if family.fits(model):
            return family
    known = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
    raise AuthorsFileError(
        f"model.name {model!r}: no released checkpoints of it; there are {known}"
    )


def _rename(
    state: Mapping[str, Tensor], family: Family, warehouses: list[str]
) -> Iterator[tuple[str, str]]:
    """``(our name, their name)`` of every key; two of theirs with one of ours are refused."""
    seen: dict[str, str] = {}
    for theirs in state:
        cells = _CELLS.fullmatch(theirs)
        if cells is None:
            ours = family.rename(theirs)
        else:
            number = int(cells[1])
            ours = f"{warehouses[number]}.weight" if number < len(warehouses) else theirs
        if ours in seen:
            raise AuthorsFileError(f"{seen[ours]} and {theirs} both stand for {ours}")
        seen[ours] = theirs
        yield ours, theirs


def _find_state(content: Any, keys: tuple[str, ...] = MODEL_KEYS) -> dict[str, Tensor] | None:
    """Tensors by name, without enclosing mappings and prefixes."""
    if not isinstance(content, Mapping):
        return None
    for key in keys:
        if key in content and (inner := _find_state(content[key])) is not None:
            return inner
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    state = {str(name): value for name, value in content.items()}
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _list(keys: list[str]) -> str:
    more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return "; ".join(keys[:_SHOWN]) + more
