"""What is measured: networks of configurations, or single layers, each beside its static twin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import load_config
from ..config.names import name_of_config
from ..config.run_schema import OptimizerConfig
from ..config.schema import Config
from ..errors import valid_names
from ..models import build_network
from ..registry import PEERS
from ..warehouse import KWConv2d, set_backend
from ..warehouse.ops import BACKENDS
from ..warehouse.partition import KernelShape
from ..warehouse.warehouse import Warehouse, WarehouseSettings
from .conditions import BenchmarkError

STATIC, GROUPED = "static", "grouped"


@dataclass(frozen=True)
class NetworkSource:
    """The network of a configuration; its static form is the same without the conversion.

    Weights are fresh, the temperature is 0. ``name`` is that of the configuration file, without
    suffix.
    """

    name: str
    config: Config

    @property
    def static_name(self) -> str:
        return self.config.model.name

    @property
    def takes_backends(self) -> bool:
        """Whether back ends compute it; else it is measured as it is."""
        peer = self.config.model.peer
        return peer is None or PEERS[peer.method].conv.is_mixture

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.config.optimizer

    @property
    def size(self) -> int | tuple[int, int]:
        """Side of the images that it is made for, or their height and width, pixels."""
        height, width = self.config.data.shape
        return height if height == width else (height, width)

    def twin(self) -> tuple[Any, ...]:
        """All that the static measurement depends on; sources with equal twins share one."""
        static = replace(self.config.model, kernel_warehouse=None, peer=None)
        return static, self.config.optimizer, self.size

    def build(self, backend: str) -> nn.Module:
        """The static form (``"static"``), or the dynamic one with a back end.

        Raises:
            ValueError: the back end cannot do one of the layers.
        """
        model = self.config.model
        if backend == STATIC:
            return build_network(replace(model, kernel_warehouse=None, peer=None))
        network = build_network(model)
        set_backend(network, backend)
        return network

    def example(self, batch_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A random batch of inputs of a height and width, and the targets of :meth:`loss`."""
        images = torch.randn(batch_size, self.config.data.channels, *shape)
        return images, torch.randint(self.config.model.num_classes, (batch_size,))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is back-propagated."""
        return F.cross_entropy(outputs.float(), targets)


@dataclass(frozen=True)
class LayerSource:
    """One convolution without bias, ``nn.Conv2d`` beside :class:`KWConv2d`, as a source of its own.

    Methods are those of :class:`NetworkSource`. Its loss is the mean square of the outputs, its
    optimizer AdamW.
    """

    takes_backends: ClassVar[bool] = True

    in_channels: int
    out_channels: int
    kernel: int  # side of the square kernel
    stride: int  # along both axes, as padding
    padding: int
    groups: int
    size: int  # side of the square input, pixels
    ratio: float  # cells per mixture of its warehouse
    share: int  # layers like this one that the warehouse is made for; the cells to mix grow with it

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

    def example(self, batch_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(batch_size, self.in_channels, *shape)
        return inputs, torch.empty(0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.float().square().mean()


Source = NetworkSource | LayerSource


@dataclass(frozen=True)
class Variant:
    """One network of a run."""

    source: Source  # what builds it
    model: str
    backend: str  # or "static"


@dataclass(frozen=True)
class Case:
    """Sources that share one static network, measured in one run."""

    sources: tuple[Source, ...]

    @property
    def input_size(self) -> int | tuple[int, int]:
        """Side of the input that they are made for, or height and width, pixels."""
        return self.sources[0].size

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
        """Static once, then every source grouped and with the back ends asked for, where it takes
        them."""
        names = [GROUPED, *(name for name in dict.fromkeys(backends) if name != GROUPED)]
        return [
            Variant(self.sources[0], self.family, STATIC),
            *(
                Variant(source, source.name, backend)
                for source in self.sources
                for backend in (names if source.takes_backends else ["auto"])
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
    sources: list[Source] = []
    for path in configs:
        config = load_config(path)
        if config.model.kernel_warehouse is None and config.model.peer is None:
            raise BenchmarkError(
                f"{path} is of a static network; name converted ones: the static network without "
                "model.kernel_warehouse is always measured beside them"
            )
        sources.append(NetworkSource(name_of_config(path), config))
    sources += map(parse_layer, layers)
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BenchmarkError(f"{', '.join(twice)}: named twice; name each network once")
    groups: list[list[Source]] = []
    for source in sources:
        group = next((own for own in groups if own[0].twin() == source.twin()), None)
        if group is None:
            groups.append(group := [])
        group.append(source)
    return [Case(tuple(group)) for group in groups]


def parse_layer(text: str) -> LayerSource:
    """A layer from ``in=512,out=512,size=7`` and further keys.

    ``kernel`` (3), ``stride`` (1), ``padding`` (half the kernel), ``groups`` (1), ``ratio`` (1,
    cells per mixture) and ``share`` (1, how many layers like this one the warehouse is made for).

    Raises:
        BenchmarkError: a key that is unknown, missing or given twice, a value that is no number, or
            a layer that cannot be.
    """
    where = f"--layer {text!r}"
    values: dict[str, Any] = {"in": None, "out": None, "kernel": 3, "stride": 1, "padding": None}
    values |= {"groups": 1, "size": None, "ratio": 1.0, "share": 1}  # in LayerSource's order
    given = set()
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in values:
            known = valid_names(key, values)
            raise BenchmarkError(f"{where}: {item!r} is not KEY=VALUE with a known key{known}")
        if key in given:
            raise BenchmarkError(f"{where}: {key} is given twice")
        if not re.fullmatch(r"\d+(\.\d+)?" if key == "ratio" else r"\d+", value):
            raise BenchmarkError(f"{where}: {key} is {value!r}, expected a number")
        given.add(key)
        values[key] = float(value) if key == "ratio" else int(value)
    if missing := [key for key in ("in", "out", "size") if key not in given]:
        raise BenchmarkError(f"{where}: {', '.join(missing)} missing; e.g. in=512,out=512,size=7")
    if values["padding"] is None:
        values["padding"] = values["kernel"] // 2
    layer = LayerSource(*values.values())
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
            raise BenchmarkError(f"back end {name!r} is unknown{valid_names(name, valid)}")


def _ratio_name(ratio: float) -> str:
    """As configurations are named: ``4x``, or ``1d2x`` for a half."""
    return f"{ratio:g}x" if ratio >= 1 else f"1d{1 / ratio:g}x"
