"""``convert``: from a static network to its KernelWarehouse form, by a plan.

The network keeps its class, its attributes and its module names: only the layers that the plan
names are replaced. The new layers register their warehouses; ``model.warehouses`` lists them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import say
from ..torch_private import has_values
from .auto import auto_plan
from .conversion import KeptWarehouse
from .convertible import (
    check_network,
    dynamic_layer,
    kernel_layers,
    kernel_shape,
    replace_layers,
    shared_places,
)
from .layers import KWLayer
from .plan import Plan, Rule, nearest
from .plans import PLANS
from .probe import arguments, evaluating
from .start import keep_kernels
from .warehouse import Warehouse, WarehouseDict, WarehouseSettings, accept_earlier_names


@dataclass
class _Group:
    """The layers that will share one warehouse, in module order."""

    name: str
    settings: WarehouseSettings
    layers: list[tuple[str, nn.Module]]


def convert(
    model: nn.Module,
    plan: str | Plan | Mapping[str, Any],
    example_input: Any = None,
    *,
    batches: Iterable[Any] | None = None,
    announce: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Replace the layers that a plan names by KernelWarehouse layers, in place.

    The converted network is at temperature 0 and computes the same outputs as the static one where
    the budget is 1 or more; below 1 its cells approximate the kernels (``kw.warehouse.start``).
    With ``start="paper"`` cells and attention are initialised at random instead, for training from
    nothing with annealing. New parameters take the device and dtype of the old ones, and train also
    where those were frozen, which is said: freeze after the conversion (``"auto"`` leaves frozen
    layers static where others train). Biases are kept. One line reports the
    result (logger ``kw``, or stderr); ``model.warehouses.conversion`` has the details. A model is
    converted as a whole or, when anything is refused, left as it was.

    Args:
        model: any network; its class and module names stay.
        plan: the name of a released plan, a :class:`Plan`, a mapping of rules, or ``"auto"`` to
            derive a plan (:func:`auto_plan`); a warning then names what cannot be converted.
        example_input: for ``"auto"``, a batch of at least two samples to run the network on: a
            tensor, a list of images, or a tuple or mapping of arguments. Default: images of the
            network's size.
        batches: several real inputs of the network, each as ``example_input``, without labels; a
            few hundred images do. Below a budget of 1 the errors of the kernels are then weighted
            by how large the layers' input channels are.
        announce: whether to log that line.
        **overrides: settings in place of the plan's, e.g. ``cell_num_ratio=4``; for ``"auto"`` also
            ``static``.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown plan or setting; a rule that matches no layer; a layer that two rules
            claim or that is used twice in the network; a layer that cannot be converted; a
            warehouse whose layers cannot be partitioned as set, or whose attention function cannot
            keep static kernels; weights that are shared or not finite; batches that the model does
            not take. The message names layer, warehouse and remedy.
    """
    check_network(model)
    if plan == "auto":
        resolved = _derive_plan(model, example_input, overrides)
    elif example_input is not None:
        raise ValueError(f"example_input is for the plan 'auto'; the plan is {plan!r}")
    else:
        resolved = resolve_plan(plan).with_overrides(overrides)
    groups = _group_layers(model, resolved)
    present = getattr(model, "warehouses", None)
    if present is not None and not isinstance(present, WarehouseDict):
        raise ValueError(
            f"{type(model).__name__} has an attribute 'warehouses' of its own; rename it"
        )
    for name in groups:
        if present is not None and name in present:
            raise ValueError(
                f"the model already has a warehouse {name!r}; name the new one otherwise"
            )
    warehouses = WarehouseDict()
    layers: dict[str, nn.Module] = {}
    fitted = [g for g in groups.values() if g.settings.cell_num_ratio < 1 and _keeps(g)]
    squares = {} if batches is None or not fitted else _input_squares(model, fitted, batches)
    if batches is not None and not fitted and announce:
        say("no images are fitted to: no warehouse has a budget below 1 and start 'keep'")
    outcome: dict[str, KeptWarehouse] = {}
    for group in groups.values():
        shapes = [kernel_shape(name, module) for name, module in group.layers]
        weight = group.layers[0][1].get_parameter("weight")
        warehouses[group.name] = warehouse = Warehouse(
            shapes, group.settings, name=group.name, device=weight.device, dtype=weight.dtype
        )
        members = [
            dynamic_layer(module, warehouse, slot) for slot, (_, module) in enumerate(group.layers)
        ]
        kept = None
        if _keeps(group):
            kernels = [module.get_parameter("weight") for _, module in group.layers]
            inputs = [squares.get(name) for name, _ in group.layers] if squares else None
            kept = keep_kernels(warehouse, [layer.attention for layer in members], kernels, inputs)
        mixtures = sum(part.mixtures for part in warehouse.partition.layers)
        outcome[group.name] = KeptWarehouse(len(members), mixtures, warehouse.partition.cells, kept)
        layers.update(zip((name for name, _ in group.layers), members, strict=True))

    conversion = replace_layers(model, layers, outcome, announce)
    if present is None:
        model.warehouses = warehouses  # type: ignore[assignment]  # an index, not a module
        model.register_load_state_dict_pre_hook(accept_earlier_names)
    else:
        present.update(warehouses)
        warehouses = present
    warehouses.plans = (*warehouses.plans, resolved.to_mapping())
    warehouses.conversion = conversion
    return model


def _keeps(group: _Group) -> bool:
    """Whether the warehouse starts from the static kernels (not on the meta device)."""
    weight = group.layers[0][1].get_parameter("weight")
    return group.settings.start == "keep" and has_values(weight)


@torch.no_grad()
def _input_squares(
    model: nn.Module, groups: Iterable[_Group], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """The mean square of every input channel of the layers to be converted, ``[I]``; layers that
    are never called are left out, with a message.

    Raises:
        ValueError: no batch, or one that the model does not take, or that is not finite.
    """
    if isinstance(batches, Tensor):
        raise ValueError("batches is a tensor; expected several batches, e.g. batches=[images]")
    layers = dict(layer for group in groups for layer in group.layers)
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, named: Any) -> None:
            channels = -1 if isinstance(module, nn.Linear) else 1
            x: Tensor = next(iter((*args, *named.values())))
            rows = x.movedim(channels, -1).flatten(0, -2)
            if len(rows) == 0:
                return
            sums[name] = sums.get(name, 0) + rows.float().square().sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in layers.items()
    ]
    kind = type(model).__name__
    try:
        with evaluating(model):
            for batch in batches:
                args, kwargs = arguments(batch)
                try:
                    model(*args, **kwargs)
                except Exception as error:  # the user's forward method may raise anything
                    raise ValueError(
                        f"batches: {kind} does not take a batch of {_shapes(batch)} "
                        f"({type(error).__name__}: {error}); give its inputs alone, without "
                        "labels, of its type and on its device"
                    ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError("batches: expected at least one batch of inputs, found none")
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(f"batches: the input of layer {name!r} is not finite")
    if unseen := [name for name in layers if name not in sums]:
        say(f"layers that no batch reaches count little: {', '.join(unseen[:5])} ({len(unseen)})")
    return {name: total / counts[name] for name, total in sums.items()}


def _shapes(batch: Any) -> str:
    args, kwargs = arguments(batch)
    values = (*args, *kwargs.values())
    return ", ".join(str(list(v.shape)) if isinstance(v, Tensor) else repr(v)[:40] for v in values)


def resolve_plan(plan: str | Plan | Mapping[str, Any]) -> Plan:
    """A plan from its name or its mapping.

    Raises:
        ValueError: an unknown name, with the nearest ones, or a mapping that is no plan.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | Mapping):
        raise ValueError(f"plan is {plan!r}; expected a name, a Plan or a mapping of rules")
    if isinstance(plan, str):
        if plan not in PLANS:
            raise ValueError(f"plan {plan!r} is unknown; {nearest(plan, [*PLANS, 'auto'])}")
        return PLANS[plan]
    return Plan.from_mapping(plan)


def drop_unused_warehouses(model: nn.Module) -> nn.Module:
    """Remove the warehouses that no layer uses any more from ``model.warehouses``, in place.

    Use it after removing layers of a converted network, for instance its last stages: it frees the
    memory of their warehouses.
    """
    modules = set(model.modules())
    for module in modules:
        index = module.__dict__.get("warehouses")
        if isinstance(index, WarehouseDict):
            for name in [name for name, warehouse in index.items() if warehouse not in modules]:
                del index[name]
    return model


def _derive_plan(model: nn.Module, example_input: Any, overrides: Mapping[str, Any]) -> Plan:
    common = {key: value for key, value in overrides.items() if key != "warehouses"}
    plan, report = auto_plan(model, example_input, **common)
    if report.refused:
        warnings.warn(
            f"{len(report.refused)} layers of {type(model).__name__} cannot be converted and stay "
            f"static:\n{report.refusals()}",
            stacklevel=3,
        )
    return plan.with_overrides({"warehouses": overrides.get("warehouses") or {}})


def set_backend(model: nn.Module, backend: str) -> None:
    """Set the back end of every layer of a model; ``"auto"`` lets the selector choose.

    Raises:
        ValueError: it does not exist or cannot do one of the layers, or there are no layers.
    """
    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no KernelWarehouse layer")
    for layer in layers:
        layer.check_backend(backend)
    for layer in layers:
        layer.backend = backend


def _group_layers(model: nn.Module, plan: Plan) -> dict[str, _Group]:
    """Which layer joins which warehouse; warehouses in the order of rules, then of first use."""
    candidates = kernel_layers(model, remove_duplicate=False)
    shared = shared_places(candidates)
    taken: dict[str, Rule] = {}
    groups: dict[str, _Group] = {}
    for rule in plan.rules:
        matched = [name for name in candidates if re.fullmatch(rule.match, name)]
        if not matched and rule.optional:
            continue
        if not matched:
            raise ValueError(
                f"plan: rule {rule.match!r} matches no layer of {type(model).__name__}; "
                f"{nearest(rule.match, candidates)}"
            )
        if rule.warehouse is not None and all(
            name in taken and taken[name].warehouse is None for name in matched
        ):
            raise ValueError(
                f"plan: rule {rule.match!r} reaches no layer: static rules before it keep "
                f"{', '.join(map(repr, matched[:3]))}; narrow those, or drop this one"
            )
        opened: list[str] = []
        for name in matched:
            claimed = taken.setdefault(name, rule)
            if claimed.warehouse is None or rule.warehouse is None:
                if claimed is not rule and claimed.warehouse is not None:
                    raise ValueError(
                        f"plan: layer {name!r} goes to warehouse {claimed.warehouse_of(name)!r} by "
                        f"rule {claimed.match!r} and is static by {rule.match!r} after it; put the "
                        "static rule first"
                    )
                continue
            own = str(rule.warehouse_of(name))
            if claimed is not rule:
                raise ValueError(
                    f"plan: layer {name!r} goes to warehouse {claimed.warehouse_of(name)!r} by "
                    f"rule {claimed.match!r} and to {own!r} by {rule.match!r}; narrow one of them"
                )
            if name in shared:
                raise ValueError(
                    f"plan: layer {name!r} (warehouse {own!r}) {shared[name]}; a layer can join a "
                    "warehouse once, with a weight of its own: leave both static, or untie them"
                )
            if rule.handover is not None and re.fullmatch(rule.handover, name):
                before = [w for w in opened if w != own]
                if not before:
                    raise ValueError(
                        f"plan: layer {name!r} is handed over to the warehouse before {own!r}, but "
                        f"rule {rule.match!r} has opened none before it; narrow 'handover'"
                    )
                own = before[-1]
            elif own not in opened:
                opened.append(own)
            settings = plan.settings_of(own, rule)
            if own not in groups:
                if "." in own or not own:
                    raise ValueError(
                        f"plan: {own!r} cannot name a warehouse: expected a name without dots"
                    )
                groups[own] = _Group(own, settings, [])
            first = groups[own].settings
            if any(getattr(first, key) != getattr(settings, key) for key in rule.settings):
                raise ValueError(
                    f"plan: rule {rule.match!r} has other settings for warehouse {own!r} than the "
                    "rule that opened it; give them once, under 'warehouses'"
                )
            groups[own].layers.append((name, candidates[name]))

    if not groups:
        raise ValueError(
            f"plan: every layer of {type(model).__name__} that it names is static; add a rule with "
            "'warehouse'"
        )
    for name in plan.warehouses:
        if name not in groups:
            raise ValueError(f"plan: settings for warehouse {name!r}; {nearest(name, groups)}")
    order = {name: i for i, name in enumerate(candidates)}
    for group in groups.values():
        group.layers.sort(key=lambda layer: order[layer[0]])
    return groups
