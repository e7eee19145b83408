"""One forward pass of an example, to learn how a network calls its layers.

A layer can have a kernel for every sample if it is called once per pass, as a module, with samples
along the first axis of its input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_BATCH = 3  # unlike 2 and 4, seldom the size of another axis


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's mode is as it was afterwards."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass
class Use:
    """How one layer is used in a pass.

    Attributes:
        order: its rank among the layers by first call; -1 = never called.
        calls: number of calls.
        by_sample: whether the first axis of its input and output was the sample in every call.
        positions: positions (pixels, tokens) a sample at the input of the last call.
        positions_out: the same at the output.
        read: whether its weight is read outside its own forward method.
    """

    order: int = -1
    calls: int = 0
    by_sample: bool = True
    positions: int = 0
    positions_out: int = 0
    read: bool = False


def default_example(model: nn.Module) -> Tensor:
    """Images of the size that a timm model names in its ``pretrained_cfg``, else 3 x 224 x 224;
    their channels are those that its first convolution takes."""
    size: Sequence[int] = (3, 224, 224)
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        found = config.get("input_size") if isinstance(config, Mapping) else None
        size = found or size
        first = config.get("first_conv") if isinstance(config, Mapping) else None
        module = dict(model.named_modules()).get(first) if isinstance(first, str) else None
        if isinstance(module, nn.Conv2d):
            size = (module.in_channels, *size[1:])
    parameter = next(model.parameters(), torch.empty(0))
    return torch.zeros(_BATCH, *size, dtype=parameter.dtype, device=parameter.device)


def probe(
    model: nn.Module, layers: Mapping[str, nn.Module], example_input: Any = None
) -> dict[str, Use]:
    """Run a copy of the network on an example and record how its layers are used.

    The copy is in evaluation mode and on the meta device: no arithmetic, almost no memory. A
    network whose forward pass needs values is copied and run on its own device.

    Args:
        model: the network; it is not changed.
        layers: the layers to observe, by name.
        example_input: a batch of at least two samples: a tensor, a list of images, or a tuple or
            mapping of arguments of ``forward``. ``None``: :func:`default_example`.

    Returns:
        Every layer's use.

    Raises:
        ValueError: an example without a batch, or one on which the network cannot run.
    """
    example = default_example(model) if example_input is None else example_input
    args, kwargs = arguments(example)
    batch = _batch_size(args, kwargs)
    try:
        return _run(_copy(model, "meta"), layers, _to(args, "meta"), _to(kwargs, "meta"), batch)
    except Exception as on_meta:  # the user's forward method may raise anything
        try:
            device = next(model.parameters(), torch.empty(0)).device
            if device.type == "meta":
                raise on_meta
            return _run(_copy(model), layers, _to(args, device), _to(kwargs, device), batch)
        except Exception as error:
            shapes = [list(t.shape) for t in _tensors((args, kwargs))]
            raise ValueError(
                f"auto: {type(model).__name__} could not be run on an example of {shapes} to see "
                f"how its layers are used ({type(error).__name__}: {error}); give an input that it "
                "takes: convert(model, 'auto', example_input=...), or a plan of your own"
            ) from error


class _WeightReads(TorchFunctionMode):
    """Records weights that torch functions read outside their layer's forward pass."""

    def __init__(self, owners: Mapping[int, Use], running: list[Use]) -> None:
        super().__init__()
        self.owners, self.running = owners, running

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            if use := self.owners.get(id(tensor)):
                use.read |= not any(use is other for other in self.running)
        return func(*args, **(kwargs or {}))


def _watched(kind: Any, use: Use, batch: int, running: list[Use], called: list[Use]) -> Any:
    """A layer's class that records its use.

    Not by hooks: beside any, nn.TransformerEncoderLayer does not take its fast path, which reads
    weights.
    """

    class Watched(kind):
        @property
        def weight(self) -> Any:
            use.read |= not any(use is other for other in running)
            return self._parameters["weight"]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            running.append(use)
            output = super().forward(*args, **kwargs)
            running.pop()
            x = next(iter(_tensors((args, kwargs))))
            if not use.calls:
                use.order = len(called)
                called.append(use)
            use.calls += 1
            space = getattr(self, "kernel_size", None)  # a convolution: channels come second
            batched = x.dim() > 1 if space is None else x.dim() == len(space) + 2
            use.by_sample &= batched and len(x) == batch
            axes = slice(1, -1) if space is None else slice(2, None)
            use.positions = math.prod(x.shape[axes])
            use.positions_out = math.prod(output.shape[axes])
            return output

    return Watched


@torch.no_grad()
def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
) -> dict[str, Use]:
    uses = {name: Use() for name in layers}
    running: list[Use] = []
    called: list[Use] = []
    owners: dict[int, Use] = {}

    for name, use in uses.items():
        module = model.get_submodule(name)
        if isinstance(weight := module._parameters.get("weight"), Tensor):
            owners[id(weight)] = use
        module.__class__ = _watched(type(module), use, batch, running, called)
    model.eval()
    with torch.random.fork_rng(devices=[]), _WeightReads(owners, running):
        model(*args, **kwargs)
    return uses


def _copy(model: nn.Module, device: str | None = None) -> nn.Module:
    """A copy of a network; with a device, its tensors are allocated there only."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():  # a weight that is computed, which torch cannot copy
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone() if device is None else value.to(device)
    if device is not None:
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for buffer in model.buffers():
            memo[id(buffer)] = buffer.to(device)
    return copy.deepcopy(model, memo)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as arguments of ``forward``: a mapping by name, a tuple in order; anything else,
    such as a list of images, is one argument."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = next(iter((*args, *kwargs.values())), None)
    images = _tensors(given) if isinstance(given, list) else []
    are_samples = bool(images) and all(image.dim() < 4 for image in images)  # no batch axis
    if are_samples and len(images) > 1:
        return len(images)  # a detector's images of several sizes
    first = next(iter(_tensors((args, kwargs))), None)
    if first is None or first.dim() < 2 or len(first) < 2 or are_samples:
        found = "no tensor" if first is None else f"a tensor of {list(first.shape)}"
        raise ValueError(
            f"auto: example_input has {found}; give a batch of at least two samples, so that the "
            "axis of samples can be told from others"
        )
    return len(first)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_to(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
