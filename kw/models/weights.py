"""Loads trained weights of several projects into a network; complete, or an error.

Formats: safetensors and torch files (``weights_only``: no code runs) of timm, torchvision and
this project, with the tensors at the top or under ``state_dict``, ``model`` and the like; the
moving average where a file has one.

Adapted, with a message: prefixes of wrappers, the names of the original releases where timm knows
them (``checkpoint_filter_fn``), torchvision's names, a first layer for RGB where the network takes
other channels, and a classifier of another width, which starts from small random weights.
"""

from __future__ import annotations

import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, one_line, say
from ..warehouse.warehouse import with_names_now

State = Mapping[str, Tensor]

_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema")
_MODELS = ("state_dict", "model", "model_state", "weights")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
_TORCHVISION = ("torchvision.models.mobilenetv2", "torchvision.models.convnext")
_OBJECT = re.compile(r"GLOBAL (\S+) was not an allowed global")
_SHOWN = 20


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; its moving average where it has one, with a message.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except Exception as error:  # SafetensorError or OSError
            raise CheckpointError(f"weights {path}: cannot be read: {one_line(error)}") from error
        return _unwrapped(tensors, path)
    if (fault := find_damage(path)) is not None:
        raise CheckpointError(f"weights {path}: cannot be read: {fault}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type of error depends on where the file is damaged
        raise CheckpointError(f"weights {path}: cannot be read: {why_unread(error)}") from error
    inside = content if isinstance(content, dict) else {}
    keys = [k for k in (*_AVERAGES, *_MODELS) if _has_tensors(inside.get(k))]
    # mmengine exchanges the two when it saves: what counts steps are the model's own weights.
    key = next((k for k in keys if k not in _AVERAGES or "steps" not in inside[k]), None)
    state = content if key is None else content[key]
    if not _has_tensors(state):
        raise CheckpointError(
            f"weights {path}: expected tensors by name, or a mapping with 'state_dict'; found "
            f"{_outline(content)}"
        )
    if key in _AVERAGES:
        say(f"{path}: its moving average ({key!r}) is taken, not the model's own weights")
    counted = state.get("n_averaged")
    if isinstance(counted, Tensor) and counted.ndim == 0:  # of torch's AveragedModel
        state = {name: value for name, value in state.items() if name != "n_averaged"}
    strange = [
        str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))
    ]
    if strange:
        found = ", ".join(strange[:5])
        raise CheckpointError(f"weights {path}: {len(strange)} entries are no tensors: {found}")
    return _unwrapped(state, path)


def _unwrapped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers."""
    named = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    if len(named) < len(state):
        raise CheckpointError(f"weights {path}: some tensors are there with and without a prefix")
    return named


def _has_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(v, Tensor) for v in content.values())


def _outline(content: Any) -> str:
    if isinstance(content, dict):
        return f"a mapping with {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
    return f"a {type(content).__name__}"


def is_converted(state: State) -> bool:
    """Whether weights are those of a converted network, of this project's or its peers' layers."""
    return any(k.startswith("warehouses.") or ".warehouse." in k for k in state)


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """The prefixes of the parameters of a timm network's classifier; none where it has none."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    named = config.get("classifier") or ()
    return tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))


def load_start(
    network: nn.Module, state: State, source: str, keep_head: bool = True, new_head: bool = True
) -> None:
    """Load weights to start from: all of them, except a classifier of another width. A first layer
    for RGB is adapted to the network's channels as timm does it.

    Args:
        network: of the same structure as the weights; a classifier that differs, or that is missing
            in the weights, starts from small random weights, with a message.
        state: the weights, under timm's names or others that :func:`read_weights` may give
            (torchvision's, those of original releases).
        source: name of these weights in messages.
        keep_head: whether to load the classifier's weights.
        new_head: whether a classifier that differs may start anew.

    Raises:
        CheckpointError: anything else is missing, unexpected or of another shape; nothing is
            loaded then.
    """
    own = network.state_dict()
    state = _renamed(network, own, with_names_now(network, state))
    state = _for_channels(network, own, state, source)
    head = classifier_names(network)
    heads = [key for key in own if head and key.startswith(head)]
    if head and not heads and any(key.startswith(head) for key in state):
        say(f"{source}: its classifier is not used, the network has none")
        keep_head = False
    other = [key for key in heads if key not in state or state[key].shape != own[key].shape]
    if other or not keep_head:
        if other and keep_head:
            found = [
                f"{key} {list(own[key].shape)} ("
                + (f"{list(state[key].shape)} in the weights)" if key in state else "missing)")
                for key in other
            ]
            if not new_head:
                raise CheckpointError(f"{source}: has another classifier: {', '.join(found)}")
            say(
                f"{source}: the classifier ({', '.join(head)}) starts from small random weights: "
                f"{', '.join(found)}"
            )
        state = {key: value for key, value in state.items() if not key.startswith(head)}
        state = {**state, **{key: own[key] for key in heads}}
    refuse_other(own, state, source)
    network.load_state_dict({key: state[key] for key in own})
    if other and keep_head:
        _soften(network, head)


def _for_channels(network: nn.Module, own: State, state: State, source: str) -> State:
    """Weights of a stem for RGB as weights for the network's own number of channels."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    key = f"{config.get('first_conv')}.weight"
    if key not in own or key not in state:
        return state
    now, before = (weights[key].shape[1:2] for weights in (own, state))
    if now == before or before != (3,) or state[key].ndim != 4:
        return state
    from timm.models import adapt_input_conv  # only here: importing timm imports this module

    say_adapted(f"{source}: {key}", 3, now[0])
    return {**state, key: adapt_input_conv(now[0], state[key])}


def say_adapted(what: str, before: int, now: int) -> None:
    """Tell of weights that :func:`timm.models.adapt_input_conv` changed."""
    how = (
        "summed over the colours"
        if now == 1
        else f"repeated over the channels, times {before} / {now}"
    )
    say(f"{what}: the first layer's weights, for {before} channels, are taken for {now}: {how}")


@torch.no_grad()
def _soften(network: nn.Module, head: tuple[str, ...]) -> None:
    """Small weights for a new classifier on trained features: all classes are equally likely at
    first. With timm's initialisation of some networks the first loss is several times larger."""
    for name, module in network.named_modules():
        if f"{name}." in head and isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _renamed(network: nn.Module, own: State, state: State) -> State:
    """Weights under the network's own names, where the names are known."""
    # Counters of batches, which files from before 2018 lack, change nothing.
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    body = {key for key in own if not key.startswith(classifier_names(network))}
    if body <= state.keys() | counters.keys():
        return {**counters, **state}
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    in_both = str(config.get("architecture")).startswith(("mobilenetv2_", "convnext_"))
    in_both = in_both or type(network).__module__.startswith(_TORCHVISION)
    if in_both and any(all(k.startswith(("features.", "class")) for k in s) for s in (own, state)):
        return _in_order(own, state)
    translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return {**counters, **state}
    try:
        return {**counters, **translate(dict(state), network)}
    except Exception:  # it expects the names of one release; refuse_other reports others
        return {**counters, **state}


def _in_order(own: State, state: State) -> State:
    """torchvision's MobileNetV2 and ConvNeXt have timm's tensors, in timm's order, but for axes of
    one element, static and converted; other names are refused later, by name."""
    if len(own) != len(state):
        return state
    renamed = {}
    for (key, value), (other, found) in zip(own.items(), state.items(), strict=True):
        rank = max(value.dim(), found.dim())
        if key.rpartition(".")[2] != other.rpartition(".")[2] and rank < 3:
            return state
        fits = value.numel() == found.numel() and value.squeeze().shape == found.squeeze().shape
        renamed[key] = found.view(value.shape) if fits else found
    return renamed


def refuse_other(own: State, state: State, source: str) -> None:
    """Refuse a state that does not fit in every tensor.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; all are listed.
    """
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in own]
    faults += [
        f"{key} is {list(state[key].shape)}, the model's is {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        shown = "\n  ".join(faults[:_SHOWN])
        rest = len(faults) - _SHOWN
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise CheckpointError(
            f"{source} is of another model ({len(faults)} differences):\n  {shown}{more}"
        )


def why_unread(error: Exception) -> str:
    """Why ``torch.load`` with ``weights_only`` failed, and the remedy."""
    found = _OBJECT.search(str(error))
    if found is None:
        return one_line(error)
    return (
        f"it holds objects of {found[1]}, and reading those could run code. If you trust the file, "
        "save its weights alone (mmdetection: tools/model_converters/publish_model.py): "
        "c = torch.load(FILE, weights_only=False); torch.save({k: c[k] for k in ('meta', "
        "'state_dict') if k in c}, NEW_FILE)"
    )


def find_damage(path: Path, *, ours: bool = False) -> str | None:
    """What is wrong with a file according to its checksums; None if they are right.

    Reads all of it, about a gigabyte a second.

    Args:
        path: the file.
        ours: this project wrote it, so that it must be a zip archive. Other files may be in torch's
            older format, which has no checksums: they are left to ``torch.load``.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start != b"PK\x03\x04":
            if not ours:
                return None
            return "its beginning is damaged" if start else "it is empty"
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        return f"it is cut off or damaged ({error})"
    except (OSError, EOFError, zlib.error, ValueError, NotImplementedError) as error:
        return f"it is damaged ({error})"
    return None if damaged is None else f"it is damaged (checksum of {damaged})"
