"""The attention temperature: one-hot kernels at 1, learned mixtures at 0.

Paper: KernelWarehouse (ICML 2024, arXiv 2406.07879), Eq. 5: tau falls linearly from 1 to 0 over the
first epochs of training and is 0 afterwards, in evaluation and in finetuning.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from .attention import KernelAttention
from .warehouse import Warehouse, WarehouseDict


def find_warehouses(model: nn.Module) -> list[Warehouse]:
    """Every warehouse that a layer of the model uses, each once; in the plan's order, where the
    model was converted by one.

    Looks through any wrapper that registers the model as a submodule (DDP, ``torch.compile``,
    averaged models).
    """
    modules = dict.fromkeys(model.modules())
    planned = (module.__dict__.get("warehouses") for module in modules)
    in_order = chain.from_iterable(
        index.values() for index in planned if isinstance(index, WarehouseDict)
    )
    used = [warehouse for warehouse in in_order if warehouse in modules]
    return [m for m in dict.fromkeys(chain(used, modules)) if isinstance(m, Warehouse)]


def has_temperature(model: nn.Module) -> bool:
    """Whether a model has a temperature to anneal: static networks and CondConv have none."""
    return bool(_temperatures(model))


def _temperatures(model: nn.Module) -> list[torch.Tensor]:
    found = (warehouse.temperature for warehouse in find_warehouses(model))
    return [temperature for temperature in found if temperature is not None]


@torch.no_grad()
def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the temperature of every warehouse of a model, through any wrapper.

    Writes into the buffers on their device: no synchronisation, no recompilation.

    Args:
        model: a model with KernelWarehouse layers, or with those of a peer that has a temperature.
        tau: temperature in [0, 1].

    Raises:
        ValueError: ``tau`` is out of range, or the model has no KernelWarehouse layer: the
            call would have no effect.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"temperature is {tau}; expected a value in [0, 1]")
    temperatures = _temperatures(model)
    if not temperatures:
        raise ValueError(
            f"{type(model).__name__} has no KernelWarehouse layer whose temperature could be set; "
            "convert it first: kw.convert(model, plan)"
        )
    for temperature in temperatures:
        temperature.fill_(tau)


def fold_temperature(model: nn.Module) -> nn.Module:
    """Fix the temperature at 0, in place: removes the temperature and the one-hot start.

    The attention becomes ``alpha = f(z)``, as exports need it. The network can no longer be
    annealed, and its state cannot be loaded into one that can.

    Returns:
        The model.
    """
    for warehouse in find_warehouses(model):
        warehouse.temperature = None
    for module in model.modules():
        if isinstance(module, KernelAttention):
            module.one_hot = None
    return model


def get_temperature(model: nn.Module) -> float:
    """The temperature of a model's warehouses. Reads from the device: not for use in a training
    step.

    Raises:
        ValueError: the model has no KernelWarehouse layer, or warehouses at different temperatures.
    """
    values = {float(temperature) for temperature in _temperatures(model)}
    if len(values) != 1:
        found = sorted(values) or "none, for want of a KernelWarehouse layer"
        raise ValueError(f"{type(model).__name__} has no single temperature; found {found}")
    return values.pop()


def annealed_temperature(step: int, steps: float) -> float:
    """tau of an update: 1 at step 0, falling linearly to 0 at ``steps`` and staying there.

    Args:
        step: optimizer updates done so far.
        steps: updates over which the temperature falls; 0 = no annealing.
    """
    return max(0.0, 1.0 - step / steps) if steps > 0 else 0.0


def anneal(model: nn.Module, passes: int) -> nn.Module:
    """Let the temperature fall by itself, for training loops that cannot call
    :func:`set_temperature`.

    The model's forward passes in training mode have the temperatures 1, 1 - 1/passes, ..., 0. A
    state that is loaded goes on where it was saved. Copies that are only evaluated, such as moving
    averages, take the temperature of the network that they are copies of, whatever was averaged.

    Args:
        model: a converted network, before it is wrapped or copied.
        passes: forward passes until the temperature is 0: updates, times the passes that add up
            to one.

    Returns:
        ``model``.

    Raises:
        ValueError: ``passes`` is no integer from 1; the model has no KernelWarehouse layer, was
            converted with ``start="keep"``, or anneals already; in the forward pass,
            ``nn.DataParallel``.
    """
    if not isinstance(passes, int) or passes < 1:
        raise ValueError(f"passes is {passes!r}; expected a number of forward passes, 1 or more")
    if any(isinstance(hook, _Annealing) for hook in model._forward_pre_hooks.values()):
        raise ValueError(f"{type(model).__name__} anneals already: call anneal once")
    index = getattr(model, "warehouses", None)
    own = index.values() if isinstance(index, WarehouseDict) else ()
    if any(warehouse.settings.start == "keep" for warehouse in own):
        raise ValueError(
            f"{type(model).__name__} was converted with start 'keep', whose network is the static "
            "one at temperature 0 only; convert it with start='paper', or do not anneal"
        )
    set_temperature(model, 1)
    annealing = _Annealing(passes)
    model.register_forward_pre_hook(annealing)
    model.register_load_state_dict_post_hook(annealing.go_on)
    return model


class _Annealing:
    """A forward pre-hook that sets the temperature of the network that it is called for."""

    def __init__(self, passes: int, origin: _Annealing | None = None) -> None:
        self.passes, self.origin = passes, origin
        self.done: int | None = 0  # passes in training; None: as the temperature tells
        self.latest: list[torch.Tensor] = []  # the temperatures that the last of them has set

    @torch.compiler.disable
    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        temperatures = _temperatures(module)
        if not temperatures:
            return  # folded
        if module.training and torch.is_grad_enabled():
            if getattr(module, "_is_replica", False):
                raise ValueError(
                    "anneal: nn.DataParallel runs replicas of the network, whose temperature is "
                    "lost after the pass; use DistributedDataParallel, or call set_temperature"
                )
            if self.done is None:
                self.done = round((1 - float(temperatures[0])) * self.passes) + 1
            set_temperature(module, annealed_temperature(self.done, self.passes))
            self.done += 1
            self.latest = temperatures
        elif not self.latest and self.origin is not None:  # a copy that is not trained
            with torch.no_grad():
                for own, trained in zip(temperatures, self.origin.latest, strict=False):
                    own.copy_(trained)

    def go_on(self, *_: Any) -> None:
        """After a state was loaded: it holds the temperature of the last pass before it."""
        self.done = None

    def __deepcopy__(self, _memo: Any) -> _Annealing:
        copied = _Annealing(self.passes, self)
        copied.done = self.done
        return copied
