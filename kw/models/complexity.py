"""Parameters, multiply-adds and assembled kernels of a network for one image.

The multiply-adds of a KernelWarehouse network fall into three disjoint parts, whose sum is what one
image costs when kernels are assembled and then applied:

- ``macs_static``: the network with every dynamic layer replaced by its static counterpart,
  counted by PyTorch's own counter: convolutions and all matrix products, those between
  queries, keys and values among them; not norms, activations, biases and pooling;
- ``macs_assembly``: ``sum_l n * |kernel_l|``, every cell into every mixture of every layer
  (KernelWarehouse, ICML 2024, arXiv 2406.07879, Eq. 2);
- ``macs_attention``: the linear layers of the attention branches (Eq. 5).

Everything runs on the meta device: shapes only, no data and no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import ConfigError
from ..config.schema import Config, ModelConfig
from ..warehouse import KWLayer, find_warehouses
from .build import build_network, check_network


@dataclass(frozen=True)
class WarehouseSize:
    """One warehouse of a network."""

    name: str  # its name in the model
    cells: int  # number of cells n
    cell_shape: list[int]  # [c_out, c_in, *kernel] of a cell
    mixtures: int  # mixtures m of all its layers together: cells / mixtures is the budget b
    layers: list[str]  # names of its layers, in the order in which they take their own cells


@dataclass(frozen=True)
class Complexity:
    """Costs of a network, exact."""

    params: int  # parameters; a shared cell counts once
    # multiply-adds an image, every dynamic layer counted as its static counterpart
    macs_static: int
    macs_assembly: int  # multiply-adds an image of assembling the kernels
    macs_attention: int  # multiply-adds an image of the attention branches
    kernel_bytes: int  # memory of the kernels assembled for an image, in bytes of float32
    warehouses: list[WarehouseSize]  # in their order in the model; none in a static network


def analyze(config: Config) -> Complexity:
    """Count what the network of a configuration costs at its ``data.input_size``.

    Raises:
        ConfigError: the network cannot be built, or refuses images of this size.
    """
    network = _build(config.model)
    static = _build(replace(config.model, kernel_warehouse=None, peer=None))
    check_network(static, config.model, config.data.shape)
    data = config.data
    images = torch.empty(1, data.channels, *data.shape, device="meta")
    try:
        macs_static = count_macs(static, images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.input_size {data.input_size}: {config.model.name} refuses such images: {error}"
        ) from error
    layers = [module for module in network.modules() if isinstance(module, KWLayer)]
    kernels = [
        torch.Size(layer.partition.kernel_shape).numel() for layer in layers if layer.per_sample
    ]
    return Complexity(
        params=sum(parameter.numel() for parameter in network.parameters()),
        macs_static=macs_static,
        macs_assembly=sum(layer.assembly_macs for layer in layers),
        macs_attention=sum(map(_attention_macs, layers)),
        kernel_bytes=4 * sum(kernels),  # float32
        warehouses=[
            WarehouseSize(
                name=warehouse.name,
                cells=warehouse.partition.cells,
                cell_shape=list(warehouse.partition.cell_shape),
                mixtures=sum(layer.mixtures for layer in warehouse.partition.layers),
                layers=[shape.name for shape in warehouse.shapes],
            )
            for warehouse in find_warehouses(network)
        ],
    )


def count_macs(module: nn.Module, *inputs: torch.Tensor | None) -> int:
    """Multiply-adds of one forward pass, on any device: of its convolutions and matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2  # the counter's unit: 2 operations a multiply-add


def _build(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        network = build_network(config)
    # With gradients, the counter registers hooks on modules, which fails for some of them.
    return network.eval().requires_grad_(False)


def _attention_macs(layer: KWLayer) -> int:
    pooled = torch.empty(1, layer.shape.in_channels, device="meta")
    return count_macs(layer.attention, pooled, layer.warehouse.temperature)
