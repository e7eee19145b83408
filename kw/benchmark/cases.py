"""What is measured: networks of configurations, or single layers, each beside its static twin."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import load_config
from ..config.run_schema import OptimizerConfig
from ..config.schema import Config
from ..models import build_network
from ..warehouse import KWConv2d, set_backend
from ..warehouse.ops import BACKENDS
from ..warehouse.partition import KernelShape
from ..warehouse.warehouse import Warehouse, WarehouseSettings
from .conditions import BenchmarkError

__all__ = [
    "BenchmarkError",
    "Case",
    "LayerSource",
    "NetworkSource",
    "Source",
    "Variant",
    "check_backends",
    "load_cases",
    "parse_layer",
]

STATIC, GROUPED = "static", "grouped"


class Source(Protocol):
    """Something with a static and a dynamic form, and what its training step needs."""

    @property
    def name(self) -> str:
        """Of the dynamic form."""

    @property
    def static_name(self) -> str:
        """Of the static form."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer that its parameters are trained with."""

    def build(self, backend: str) -> nn.Module:
        """The static form, or the dynamic one with a back end; fresh weights, temperature 0.

        Raises:
            ValueError: the back end cannot do one of the layers.
        """

    def example(self, batch_size: int, input_size: int) -> tuple[Tensor, Tensor]:
        """A random batch of inputs, and the targets of :meth:`loss`."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is back-propagated."""


@dataclass(frozen=True)
class NetworkSource:
    """The network of a configuration; its static form is the same without the conversion.

    Attributes:
        name: the configuration file's name without suffix.
        config: the configuration.
    """

    name: str
    config: Config

    @property
    def static_name(self) -> str:
        return self.config.model.name

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.config.optimizer

    def twin(self) -> tuple[Any, ...]:
        """What decides over the static measurement: equal for sources that can share one."""
        static = replace(self.config.model, kernel_warehouse=None, peer=None)
        return static, self.config.optimizer, self.config.data.input_size

    def build(self, backend: str) -> nn.Module:
        model = self.config.model
        if backend == STATIC:
            return build_network(replace(model, kernel_warehouse=None, peer=None))
        network = build_network(model)
        set_backend(network, backend)
        return network

    def example(self, batch_size: int, input_size: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(batch_size, 3, input_size, input_size)
        return images, torch.randint(self.config.model.num_classes, (batch_size,))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), targets)


@dataclass(frozen=True)
class LayerSource:
    """One convolution without bias: ``nn.Conv2d`` beside :class:`KWConv2d`.

    Its loss is the mean square of the outputs, its optimizer AdamW.

    Attributes:
        in_channels: input channels.
        out_channels: output channels.
        kernel: side of the square kernel.
        stride: along both axes.
        padding: along both axes.
        groups: groups of the convolution.
        size: side of the square input, pixels.
        ratio: cells per mixture of its warehouse.
        share: layers like this one that the warehouse is made for; the cells to mix grow with it.
    """

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    groups: int
    size: int
    ratio: float
    share: int

    @property
    def static_name(self) -> str:
        """Carries all sizes, e.g. ``conv_512x512_k3_s1_p1``."""
        grouped = f"_g{self.groups}" if self.groups > 1 else ""
        sizes = f"k{self.kernel}_s{self.stride}_p{self.padding}{grouped}"
        return f"conv_{self.in_channels}x{self.out_channels}_{sizes}"

    @property
    def name(self) -> str:
        shared = f"_share{self.share}" if self.share > 1 else ""
        return f"kw_{self.static_name}_{_ratio_name(self.ratio)}{shared}"

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(lr=1e-3)

    def twin(self) -> tuple[Any, ...]:
        """See :meth:`NetworkSource.twin`."""
        return self.static_name, self.size

    def build(self, backend: str) -> nn.Module:
        sizes = (self.in_channels, self.out_channels, self.kernel, self.stride, self.padding)
        if backend == STATIC:
            return nn.Conv2d(*sizes, groups=self.groups, bias=False)
        kernel = (self.kernel, self.kernel)
        shape = KernelShape(self.out_channels, self.in_channels, kernel, self.groups)
        settings = WarehouseSettings(cell_num_ratio=self.ratio)
        warehouse = Warehouse([shape] * self.share, settings)
        layer = KWConv2d(*sizes, groups=self.groups, bias=False, warehouse=warehouse)
        set_backend(layer, backend)
        return layer

    def example(self, batch_size: int, input_size: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(batch_size, self.in_channels, input_size, input_size)
        return inputs, torch.empty(0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.float().square().mean()


@dataclass(frozen=True)
class Variant:
    """One network of a run.

    Attributes:
        source: its place among the case's sources; the static network is built from the first.
        model: name of the network.
        backend: ``"static"``, or a back end.
    """

    source: int
    model: str
    backend: str


@dataclass(frozen=True)
class Case:
    """Sources that share one static network, measured in one run.

    Attributes:
        sources: the dynamic networks.
        input_size: side of the input that they are made for, pixels.
    """

    sources: tuple[NetworkSource | LayerSource, ...]
    input_size: int

    @property
    def family(self) -> str:
        """The static network's name."""
        return self.sources[0].static_name

    @property
    def subject(self) -> str:
        """A name for all: the only source's, or the family's with what tells sources apart."""
        names = [source.name for source in self.sources]
        if len(names) == 1:
            return names[0]
        words = [name.split("_") for name in names]
        while all(own[0] == words[0][0] and len(own) > 1 for own in words):
            words = [own[1:] for own in words]
        return "_".join([self.family, *(word for own in words for word in own)])

    def variants(self, backends: Sequence[str]) -> list[Variant]:
        """Static once, then every source grouped and with the back ends asked for."""
        names = [GROUPED, *(name for name in dict.fromkeys(backends) if name != GROUPED)]
        return [
            Variant(0, self.family, STATIC),
            *(
                Variant(i, source.name, backend)
                for i, source in enumerate(self.sources)
                for backend in names
            ),
        ]


def load_cases(configs: Sequence[str], layers: Sequence[str] = ()) -> list[Case]:
    """Read what is to be measured and put together what shares a static network.

    Args:
        configs: configuration files of converted networks.
        layers: layers as :func:`parse_layer` reads them.

    Raises:
        ConfigError: a file that is no configuration.
        BenchmarkError: a configuration of a static network, or twice the same; a layer that cannot
            be.
    """
    sources: list[NetworkSource | LayerSource] = []
    for path in configs:
        config = load_config(path)
        if config.model.kernel_warehouse is None and config.model.peer is None:
            raise BenchmarkError(
                f"{path} is of a static network; name converted ones: the static network without "
                "model.kernel_warehouse is always measured beside them"
            )
        sources.append(NetworkSource(Path(path).stem, config))
    sources += map(parse_layer, layers)
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BenchmarkError(f"{', '.join(twice)}: named twice; name each network once")
    groups: list[list[NetworkSource | LayerSource]] = []
    for source in sources:
        for group in groups:
            if group[0].twin() == source.twin():
                group.append(source)
                break
        else:
            groups.append([source])
    return [Case(tuple(group), _input_size(group[0])) for group in groups]


def parse_layer(text: str) -> LayerSource:
    """A layer from ``in=512,out=512,size=7`` and further keys.

    ``kernel`` (3), ``stride`` (1), ``padding`` (half the kernel), ``groups`` (1), ``ratio`` (1,
    cells per mixture) and ``share`` (1, how many layers like this one the warehouse is made for).

    Raises:
        BenchmarkError: a key that is unknown, missing or given twice, a value that is no number, or
            a layer that cannot be.
    """
    where = f"--layer {text!r}"
    valid = ("in", "out", "size", "kernel", "stride", "padding", "groups", "ratio", "share")
    given: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in valid:
            near = difflib.get_close_matches(key, valid, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            raise BenchmarkError(f"{where}: {item!r} is no KEY=VALUE that is known; {hint}")
        if key in given:
            raise BenchmarkError(f"{where}: {key} is given twice")
        given[key] = value
    if missing := [key for key in ("in", "out", "size") if key not in given]:
        raise BenchmarkError(f"{where}: {', '.join(missing)} missing; e.g. in=512,out=512,size=7")
    for key, value in given.items():
        pattern = r"\d+(\.\d+)?" if key == "ratio" else r"\d+"
        if not re.fullmatch(pattern, value):
            raise BenchmarkError(f"{where}: {key} is {value!r}, expected a number")
    number = {key: int(value) for key, value in given.items() if key != "ratio"}
    kernel = number.get("kernel", 3)
    layer = LayerSource(
        in_channels=number["in"],
        out_channels=number["out"],
        kernel=kernel,
        stride=number.get("stride", 1),
        padding=number.get("padding", kernel // 2),
        groups=number.get("groups", 1),
        size=number["size"],
        ratio=float(given.get("ratio", "1")),
        share=number.get("share", 1),
    )
    try:
        with torch.device("meta"):
            layer.build("auto")(torch.empty(2, layer.in_channels, layer.size, layer.size))
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise BenchmarkError(f"{where}: {error}") from error
    return layer


def check_backends(backends: Sequence[str]) -> None:
    """Refuse a back end that does not exist.

    Raises:
        BenchmarkError: naming the valid ones.
    """
    valid = ["auto", *BACKENDS]
    for name in backends:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BenchmarkError(f"back end {name!r} is unknown; {hint}known: {', '.join(valid)}")


def _ratio_name(ratio: float) -> str:
    """As configurations are named: ``4x``, or ``1d2x`` for a half."""
    return f"{ratio:g}x" if ratio >= 1 else f"1d{1 / ratio:g}x"


def _input_size(source: NetworkSource | LayerSource) -> int:
    return source.size if isinstance(source, LayerSource) else source.config.data.input_size
