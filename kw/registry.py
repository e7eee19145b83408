"""All registries: the entries that a configuration can name, by kind.

An entry is registered where it is defined: in this project or in a user's module, which a
configuration lists under ``custom_imports`` (docs/extending.md)::

    from kw.registry import ATTENTION_FUNCTIONS

    @ATTENTION_FUNCTIONS.register()
    def tanh(logits):
        return logits.tanh()

The entries are the choices of the configuration's keys. This module imports nothing but the
standard library; a registry imports the modules of the project's own entries when it is first read.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, TypeVar

from .errors import UserError, valid_names

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.optim import Optimizer

    from .data.listing import Listing
    from .deploy.export import Exporter
    from .evaluation.accuracy import Metric
    from .peers.convert import Method
    from .training.hooks import Hook
    from .training.loggers import Logger
    from .warehouse.ops.contraction import Contraction
    from .warehouse.plan import Plan


T = TypeVar("T")
E = TypeVar("E")


class Registry(MutableMapping[str, T]):
    """Entries by name, in the order in which they were registered.

    Args:
        kind: what an entry is, for messages.
        *modules: of the project's own entries, imported in this order until a name is found.

    Attributes:
        entries: the entries registered so far.
    """

    def __init__(self, kind: str, *modules: str) -> None:
        self.kind = kind
        self._modules = list(modules)
        self.entries: dict[str, T] = {}

    def register(self, name: str | None = None) -> Callable[[E], E]:
        """A decorator that registers a function or class, by its own name where none is given.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: E) -> E:
            self[name or str(getattr(entry, "__name__", ""))] = typing.cast(T, entry)
            return entry

        return add

    def find(self, name: str) -> T:
        """The entry of a name.

        Raises:
            UserError: there is none; the message has the nearest name and all known names.
        """
        if name in self:
            return self[name]
        raise UserError(f"{self.kind} {name!r} is unknown{valid_names(name, self)}")

    def __getitem__(self, name: str) -> T:
        while name not in self.entries and self._modules:
            self._import_next()
        return self.entries[name]

    def _import_next(self) -> None:
        module = self._modules.pop(0)  # first: the module may look up entries itself
        try:
            importlib.import_module(module)
        except BaseException:
            self._modules.insert(0, module)
            raise

    def __setitem__(self, name: str, entry: T) -> None:
        if name in self.entries and _identity(self.entries[name]) != _identity(entry):
            raise ValueError(f"the {self.kind} {name!r} exists already; choose another name")
        self.entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __iter__(self) -> Iterator[str]:
        while self._modules:
            self._import_next()
        return iter(list(self.entries))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _identity(entry: object) -> object:
    """An identity that stays the same when a module or notebook cell is run again."""
    name = getattr(entry, "__qualname__", None)
    return entry if name is None else (getattr(entry, "__module__", None), name)


ATTENTION_FUNCTIONS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "attention function", "kw.warehouse.attention"
)
"""Logits ``[..., n + 1]``, the null cell last -> coefficients of the same shape."""

CONTRACTIONS: Registry[Contraction] = Registry("back end", "kw.warehouse.ops.backends")
"""Back ends with gradients of their own, the preferred first where costs are equal."""

PLANS: Registry[Plan] = Registry("plan", "kw.warehouse.plans")
"""Which layers of a network join which warehouse."""

PEERS: Registry[Method] = Registry("peer", "kw.peers.convert")
"""Other dynamic convolutions."""

DATASETS: Registry[Callable[..., Listing]] = Registry(
    "data set", "kw.data.listing", "kw.data.archives", "kw.data.tables"
)
"""``(root, split, **args) -> Listing``: the images of a split, their labels and classes."""

TRANSFORMS: Registry[Callable[..., Callable[[Image], Image]]] = Registry("transform")
"""``(**args) -> (image -> image)``, RGB, or grey with ``data.channels: 1``; applied to a training
image before its crop."""

LOSSES: Registry[Callable[..., Tensor]] = Registry("loss", "kw.models.losses")
"""``(logits [B, C] float32, targets, **args) -> scalar``; targets are labels ``[B]`` or
probabilities ``[B, C]``. ``loss.class_weights`` needs an argument of that name, ``[C]``."""

METRICS: Registry[Callable[..., Metric]] = Registry(
    "metric", "kw.evaluation.accuracy", "kw.evaluation.multilabel"
)
"""``(device, **args) -> Metric``, for every evaluation anew."""

OPTIMIZERS: Registry[Callable[..., Optimizer]] = Registry(
    "optimizer", "kw.training.optim", "kw.training.more_optimizers"
)
"""``(groups, lr=..., **args) -> Optimizer``; each group has its own weight decay."""

SCHEDULES: Registry[Callable[..., float]] = Registry("schedule", "kw.training.schedule")
"""``(moment, **args) -> learning rate``, after the warm-up."""

HOOKS: Registry[Callable[..., Hook]] = Registry("hook", "kw.training.hooks.stopping")
"""``(**args) -> Hook``."""

LOGGERS: Registry[Callable[..., Logger]] = Registry("logger", "kw.training.loggers")
"""``(**args) -> Logger``."""

EXPORTERS: Registry[Exporter] = Registry("format", "kw.deploy.export")
"""Formats of exported files, by the end of their names."""


def argument_fault(
    entry: Callable[..., object],
    given: Mapping[str, object],
    passed: int = 0,
    elsewhere: Collection[str] = (),
) -> str | None:
    """What is wrong with an entry's arguments, as what was expected; ``None`` if nothing is.

    Args:
        entry: a function or class; its signature says what it takes.
        given: keyword arguments of a configuration.
        passed: leading arguments that the caller passes, not the configuration.
        elsewhere: arguments that other keys set.
    """
    parameters = list(inspect.signature(entry).parameters.values())[passed:]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    known = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    for name in given:
        if name not in known and not takes_any:
            return f"no {name!r} among its arguments{valid_names(name, known)}"
    needed = [name for name, p in known.items() if p.default is p.empty]
    missing = [name for name in needed if name not in given and name not in elsewhere]
    if missing:
        return f"its argument {missing[0]!r}, which has no default"
    hints = _hints(entry)
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            return f"its argument {name!r} to be {_named(hints[name])}, found {value!r}"
    return None


def takes(entry: Callable[..., object], name: str) -> bool:
    """Whether a function or class has an argument of a name."""
    parameters = inspect.signature(entry).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _hints(entry: Callable[..., object]) -> dict[str, object]:
    made = vars(entry).get("__init__", entry) if isinstance(entry, type) else entry
    try:  # not typing's, which on Python 3.10 writes `float | None` otherwise beside a default
        parameters = inspect.signature(made, eval_str=True).parameters.values()
    except (NameError, TypeError, ValueError):  # a type that is imported for type checkers only
        return {}
    return {p.name: p.annotation for p in parameters if p.annotation is not p.empty}


def _fits(value: object, hint: object) -> bool:
    """Whether a plain value is of a type; true for types that no plain value can have."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        element = inner[0] if inner else object
        return isinstance(value, list) and all(_fits(each, element) for each in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint
    if hint in (None, type(None)):
        return value is None
    return True


def _named(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
