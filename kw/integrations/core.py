"""What the adapters share: when a network is converted, and which temperature it has when.

The host builds the network and loads static weights into it. :meth:`Recipe.convert` follows, before
optimizer, averages and process group are made of its parameters. :meth:`Recipe.set_temperature`
follows before every update, and after every update of an average.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from torch import nn

from ..errors import one_line, say
from ..warehouse import convert, set_temperature
from ..warehouse.temperature import (
    annealed_temperature,
    find_warehouses,
    get_temperature,
    has_temperature,
)
from ..warehouse.warehouse import WarehouseDict


def host(package: str, oldest: str, module: str | None = None) -> Any:
    """Import an adapter's host: a package in a version from ``oldest`` on, as ``"2.6"``, or its
    ``module``.

    Raises:
        ImportError: it is missing, fails when it is imported, or is too old.
    """
    works = f"this adapter works with {package} {oldest} or later"
    remedy = f"pip install '{package}>={oldest}'"
    try:
        found, installed = importlib.import_module(module or package), version(package)
    except Exception as error:  # what is installed in part may raise anything
        raise ImportError(
            f"{works}, which cannot be imported ({one_line(error)}); {remedy}"
        ) from error
    if _numbers(installed) < _numbers(oldest):
        raise ImportError(f"{works}; found {installed}; {remedy}")
    return found


def _numbers(text: str) -> list[int]:
    """Major and minor version."""
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


@dataclass(frozen=True)
class Recipe:
    """How a host's network becomes dynamic.

    Attributes:
        plan: as for :func:`kw.convert`.
        settings: its overrides, for instance ``{"cell_num_ratio": 4}``.
        anneal: epochs over which the temperature falls from 1 to 0, the paper's training from
            nothing: cells and attention then start at random (``start="paper"``). 0: the network
            starts as the static one and stays at temperature 0.
    """

    plan: str | Mapping[str, Any] = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    anneal: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.anneal < float("inf"):
            raise ValueError(f"anneal is {self.anneal}; expected epochs, 0 or more")
        if self.anneal and self.settings.get("start", "paper") != "paper":
            raise ValueError(
                f"anneal is {self.anneal} epochs with start 'keep', whose network is the static "
                "one at temperature 0 only; drop one of the two"
            )

    def convert(self, model: nn.Module, example_input: Any = None) -> nn.Module:
        """Convert a network in place; one that has KernelWarehouse layers stays as it is.

        Raises:
            ValueError: as :func:`kw.convert`, and as :meth:`check`.
        """
        if find_warehouses(model):
            self.check(model=model)
            say(f"{type(model).__name__} is converted already; it goes on as it is")
            return model
        settings = {"start": "paper" if self.anneal else "keep", **self.settings}
        example = example_input if self.plan == "auto" else None
        convert(model, self.plan, example, **settings)
        self.set_temperature(0, model)  # the start's, by which check knows it
        return model

    def check(self, epochs: float = float("inf"), model: nn.Module | None = None) -> None:
        """Before a run of ``epochs`` epochs, and of ``model`` if it does not resume one.

        Raises:
            ValueError: the run ends before the annealing does, or the model is past its start:
                annealing would set the temperature of trained weights to 1 again.
        """
        if self.anneal > epochs:
            raise ValueError(f"anneal is {self.anneal:g} epochs; the run has {epochs:g}")
        if not self.anneal or model is None or not has_temperature(model):
            return
        if (tau := get_temperature(model)) < 1:
            raise ValueError(
                f"the network is converted and at temperature {tau:g}, but annealing starts at "
                "1 with random cells; train it on with anneal=0, or resume its run (cells that "
                "are random: kw.set_temperature(model, 1))"
            )

    def set_temperature(self, epoch: float, *models: nn.Module | None) -> float:
        """Set the temperature of networks and their averages at ``epoch`` epochs, a fraction within
        one, and return it. Models that are ``None`` are passed over."""
        tau = annealed_temperature(epoch, self.anneal)  # type: ignore[arg-type]  # a fraction
        for model in models:
            if model is not None:
                set_temperature(model, tau)
        return tau

    def end(self, model: nn.Module) -> None:
        """After a run: say so where it ended before the annealing, by its own clock or a hook."""
        if self.anneal and has_temperature(model) and (tau := get_temperature(model)) >= 0.01:
            say(
                f"training has ended at temperature {tau:.2f}, before {self.anneal:g} epochs of "
                f"annealing: coefficients still hold {tau:.0%} of the one-hot start; train on"
            )


def plans_of(model: nn.Module) -> list[dict[str, Any]]:
    """The plans by which a network was converted, for the host's checkpoint: JSON's types alone."""
    index = getattr(model, "warehouses", None)
    return list(index.plans) if isinstance(index, WarehouseDict) else []


def plans_by_part(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """:func:`plans_of` of a model and its parts, by the name of the part; ``""``: the model."""
    found = {name: plans_of(part) for name, part in model.named_modules()}
    return {name: plans for name, plans in found.items() if plans}


def refuse_other(trained: Any, configured: Any, what: str = "the checkpoint") -> None:
    """Refuse plans that are not those of ``what``: another attention function or start has the same
    tensors, and would go on without a word.

    Raises:
        ValueError: they differ.
    """
    if trained != configured:
        raise ValueError(
            f"{what} was converted by another plan or with other settings; take the recipe that it "
            "was trained with"
        )


def repeat(model: nn.Module, plans: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Convert a static network, in place, as :func:`plans_of` says, to take a checkpoint's weights.

    Raises:
        ValueError: as :func:`kw.convert`.
    """
    plans = [dict(plan) for plan in plans]
    for plan in plans:
        convert(model, plan, start="paper", announce=False)  # no start to compute: weights follow
    if plans:
        model.warehouses.plans = tuple(plans)  # type: ignore[union-attr]
    return model
