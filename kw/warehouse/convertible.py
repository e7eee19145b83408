"""Which static layers have a KernelWarehouse counterpart, and how one is made from the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from ..errors import say
from ..torch_private import has_values
from .conversion import Conversion, KeptWarehouse, count_parameters, guard_saving, thawed
from .layers import KWConv1d, KWConv2d, KWConv3d, KWConvNd, KWLayer, KWLinear
from .partition import KernelShape
from .same import KWConv2dSame
from .sharded import is_sharded
from .warehouse import Warehouse

# By qualified name, so that libraries need not be imported. Exact classes: a subclass may compute
# something else, for instance with standardised weights.
_COUNTERPARTS: dict[str, type[KWConvNd] | type[KWLinear]] = {
    "torch.nn.modules.conv.Conv1d": KWConv1d,
    "torch.nn.modules.conv.Conv2d": KWConv2d,
    "torch.nn.modules.conv.Conv3d": KWConv3d,
    "torch.nn.modules.linear.Linear": KWLinear,
    "timm.layers.conv2d_same.Conv2dSame": KWConv2dSame,
    "timm.layers.linear.Linear": KWLinear,  # adds only a cast for torch.jit.script
}
_PLAIN = "Conv1d, Conv2d, Conv3d, Linear"


def register_convertible(
    kind: type[nn.Module], counterpart: type[KWConvNd] | type[KWLinear]
) -> None:
    """Let plans convert a layer class of the user.

    Args:
        kind: a subclass of ``nn.Conv1d/2d/3d`` or ``nn.Linear`` with their attributes; its
            subclasses are not included.
        counterpart: what replaces it: ``KWConv2d`` where the subclass computes a plain convolution,
            otherwise a subclass of it with the same arguments.

    Raises:
        ValueError: ``kind`` is no convolution and no linear layer, or the counterpart is of the
            other kind.
    """
    wanted = KWLinear if issubclass(kind, nn.Linear) else KWConvNd
    if not issubclass(kind, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        raise ValueError(f"{kind.__name__} is not a subclass of one of {_PLAIN}")
    if not issubclass(counterpart, wanted):
        raise ValueError(
            f"{kind.__name__} needs a subclass of {wanted.__name__}, got {counterpart.__name__}"
        )
    _COUNTERPARTS[_qualified(kind)] = counterpart


def _has_kernel(module: nn.Module) -> bool:
    """A leaf with a weight of at least two axes; plans may name it, convertible or not."""
    if is_parametrized(module, "weight"):
        return True
    weight = getattr(module, "weight", None)
    if isinstance(weight, UninitializedParameter):
        return True
    return isinstance(weight, torch.Tensor) and weight.dim() >= 2 and not list(module.children())


def kernel_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """The layers with kernels of their own, but for those inside of dynamic layers, by name."""
    everything = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{n}." for n, m in everything if isinstance(m, KWLayer))
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=remove_duplicate)
        if name and _has_kernel(module) and not name.startswith(inside)
    }


def computed_part(module: nn.Module) -> str | None:
    """Which of a layer's weight and bias is no parameter; ``None``: those that it has are."""
    parts = [part for part in ("weight", "bias") if module._parameters.get(part) is None]
    return next((part for part in parts if getattr(module, part, None) is not None), None)


def has_other_forward(module: nn.Module) -> bool:
    """Whether this very layer has a forward method that is not its class's, as adapters and
    offloading give it one: the layer in its place would not compute the same."""
    own = {n: f for n, f in vars(module).items() if n in ("forward", "_conv_forward")}
    # One that was put back is that of the class, bound to the layer.
    return any(f != getattr(type(module), n).__get__(module) for n, f in own.items())


def why_static(name: str, module: nn.Module) -> str | None:
    """Why a layer cannot be converted; ``None`` where it can."""
    if part := computed_part(module):
        return (
            f"the {part} of layer {name!r} is no parameter but computed (by weight or spectral "
            "normalisation, pruning, ...); remove that first, or keep the layer static"
        )
    if has_other_forward(module):
        return (
            f"the forward method of layer {name!r} is replaced (by an adapter, offloading, ...); "
            "remove that first, or keep the layer static"
        )
    if _qualified(type(module)) not in _COUNTERPARTS:
        return (
            f"layer {name!r} is a {type(module).__name__}, which cannot be converted (only "
            f"{_PLAIN} can, not their subclasses); add a rule {{match: ..., static: true}} before "
            "the one that matches it, or register_convertible(...) if it computes the same"
        )
    return None


def shared_places(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that a network has, or whose weight it has, in several places: how, in words."""
    places: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        places.setdefault(id(module if weight is None else weight), []).append(name)
    found = {}
    for names in places.values():
        for name in names if len(names) > 1 else ():
            other = next(each for each in names if each != name)
            is_same = modules[other] is modules[name]
            how = "is the same module as" if is_same else "shares its weight with"
            found[name] = f"{how} {other!r}"
    return found


def check_network(model: nn.Module) -> None:
    """Refuse networks that cannot be converted now, or at all.

    Raises:
        ValueError: under ``torch.inference_mode``; it is in DDP or FSDP already; or the network is
            written for quantisation in eager mode: it has a stub or a layer of ``torch.ao``.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("convert under torch.inference_mode makes weights that cannot be trained")
    if any(map(is_sharded, model.parameters())):
        raise ValueError("FSDP has sharded the network; convert it first, then shard it")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel averages only the gradients of the parameters that it was "
                "given; convert the network first, then wrap it"
            )
        if type(module).__module__.startswith(("torch.ao.quantization.", "torch.ao.nn.")):
            raise ValueError(
                f"{type(model).__name__} is written for quantisation in eager mode ({name!r} is a "
                f"{type(module).__name__}), which fuses and replaces the weights of convolutions; "
                "convert the plain network, for instance of torchvision.models instead of "
                "torchvision.models.quantization"
            )


def kernel_shape(name: str, module: nn.Module) -> KernelShape:
    """The kernel of a layer that a plan names.

    Raises:
        ValueError: it cannot be converted.
    """
    if reason := why_static(name, module):
        raise ValueError(f"plan: {reason}")
    if isinstance(module, nn.Linear):
        return KernelShape(module.out_features, module.in_features, (1,), 1, name)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    kernel = tuple(module.kernel_size)
    return KernelShape(module.out_channels, module.in_channels, kernel, module.groups, name)


def dynamic_layer(module: nn.Module, warehouse: Warehouse, slot: int) -> KWLayer:
    """The KernelWarehouse layer in place of a static one; bias, mode and hooks are kept."""
    shared: dict[str, Any] = {
        "warehouse": warehouse,
        "slot": slot,
        "name": warehouse.shapes[slot].name,
    }
    make: Any = _COUNTERPARTS[_qualified(type(module))]  # the signatures of the two kinds differ
    layer: KWLayer = make(*arguments_of(module), **shared)
    succeed(module, layer)
    return layer


def arguments_of(module: nn.Module) -> tuple[Any, ...]:
    """The constructor arguments of a convolution or linear layer, in order."""
    has_bias = module._parameters.get("bias") is not None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, has_bias
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        has_bias,
        module.padding_mode,
    )


def succeed(module: nn.Module, layer: KWLayer) -> None:
    """Give a layer the bias, the mode and the hooks of the layer that it replaces."""
    if module.bias is not None:
        layer.take_bias(module.get_parameter("bias"))
    # The same dictionaries, not copies: handles that remove hooks refer to them.
    for attribute, value in vars(module).items():
        if "_hooks" in attribute and "state_dict" not in attribute:
            setattr(layer, attribute, value)
    layer._is_full_backward_hook = module._is_full_backward_hook
    layer.train(module.training)


def replace_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    warehouses: dict[str, KeptWarehouse],
    announce: bool,
    method: str | None = None,
) -> Conversion:
    """Put layers in the place of those with their names, and say what the conversion did."""
    frozen = [name for name in layers if not model.get_parameter(f"{name}.weight").requires_grad]
    before = count_parameters(model)
    static = tuple(name for name in kernel_layers(model) if name not in layers)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    guard_saving(model)
    after, meta = count_parameters(model), not all(map(has_values, model.parameters()))
    kind = type(model).__name__
    conversion = Conversion(kind, before, after, warehouses, static, method, meta)
    if announce:
        say(str(conversion))
        if frozen:
            say(thawed(frozen))
    return conversion


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
