"""One network on several processes: DDP, or FSDP2 with the warehouses sharded.

DDP: every process holds everything; gradients are averaged in buckets while the backward pass goes
on. A bucket waits for the last of its gradients, and the cells of a warehouse have theirs only when
the first of the layers that share them has run backward. Buckets are therefore filled in the order
in which gradients come, from the first update on. torch finds that order by itself, but after the
first update: a run that was resumed would add up that update's gradients in other buckets, hence in
another order, than one that was never interrupted.

FSDP2: every process holds one of N parts of each parameter, its gradient, its optimizer state and
its average. Cells are gathered before the first layer that uses them, and scattered as soon as
their gradient is complete; everything else, small in a converted network, is gathered for the whole
pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..config.run_schema import DistributedConfig, RunConfig
from ..torch_private import prepare_reduction
from ..warehouse import KWLayer, Warehouse
from ..warehouse.ops.summing import forget_anchor
from .average import MovingAverage
from .distributed import Process
from .logs import logger


def across_processes(model: nn.Module, config: DistributedConfig, process: Process) -> nn.Module:
    """A model on its device; in DDP where several processes hold all of it."""
    model = model.to(process.device)
    if process.world_size == 1 or config.strategy == "fsdp":
        return model  # the latter was sharded in place before its optimizer was made
    return wrap_ddp(model, config.bucket_mb)


def wrap_ddp(model: nn.Module, bucket_mb: float) -> DistributedDataParallel:
    """A model in DDP, its buckets laid out for good; a collective call.

    A bucket is closed when it holds ``bucket_mb`` MiB; a parameter is never split.
    """
    with warnings.catch_warnings():
        # torch 2.15 has a newer name for it, which earlier versions do not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        ddp = DistributedDataParallel(
            # No device_ids: preprocessing moves a batch, and reads its indices on the host.
            module=model,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_mb,
        )
    _lay_out_buckets(ddp, backward_order(model))
    return ddp


def backward_order(model: nn.Module) -> list[nn.Parameter]:
    """Trained parameters in the order in which their gradients come.

    Layers run backward in the reverse order of their registration. Cells come with the first layer
    of their warehouse, before the gradients of its attention.
    """
    forward: dict[nn.Parameter, None] = {}
    for module in model.modules():
        if isinstance(module, Warehouse):
            continue  # with its first layer
        if isinstance(module, KWLayer):
            forward.update(dict.fromkeys(module.attention.parameters()))
            forward.update(dict.fromkeys(module.warehouse.parameters()))
        forward.update(dict.fromkeys(module.parameters(recurse=False)))
    forward.update(dict.fromkeys(model.parameters()))  # of warehouses that no layer uses
    return [parameter for parameter in reversed(forward) if parameter.requires_grad]


def _lay_out_buckets(ddp: DistributedDataParallel, order: list[nn.Parameter]) -> None:
    """Let DDP see gradients of zero come in this order.

    It rebuilds its buckets once, before the forward pass that follows the first backward pass.
    """
    prepare_reduction(ddp)
    for parameter in order:
        (parameter.view(-1)[:1] * 0).sum().backward()
    for parameter in order:
        parameter.grad = None


def distribute(network: nn.Module, config: RunConfig, process: Process) -> MovingAverage | None:
    """Shard a network (:func:`shard`) where the configuration says so.

    Returns:
        Its moving average, where there is one, in a copy that is sharded likewise.
    """
    average: MovingAverage | None = None
    if config.ema is not None:
        holder = copy.deepcopy(network).eval().requires_grad_(False)
        average = MovingAverage(holder, config.ema.decay, config.ema.warmup)
    if config.distributed.strategy != "fsdp":
        return average
    if process.world_size == 1:
        logger.warning("distributed.strategy: fsdp: there is one process, nothing is sharded")
        return average
    shard(network, process)
    if average is not None:
        shard(average.network, process)
    return average


def shard(network: nn.Module, process: Process) -> None:
    """Shard a network, the same on all processes and on their devices, over them, in place.

    Parameters become ``DTensor``; between updates each process holds its part of them. Whatever
    uses parameters by themselves, optimizers above all, has to be made afterwards. The forward pass
    has to be run by calling the network.
    """
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    warehouses: dict[Warehouse, None] = {}
    for module in network.modules():
        if isinstance(module, KWLayer):
            warehouses[module.warehouse] = None
            module.register_forward_pre_hook(_gather_cells)
            module.register_forward_hook(_gather_again)
    # A layer does not write to its input, which is what the warning is about.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPWarehouse\) returned")
    for warehouse in warehouses:
        # A warehouse's pass ends at once, but layers go on to use its cells.
        fully_shard(warehouse, mesh=mesh, reshard_after_forward=False)
    sharded = [module for module in warehouses if isinstance(module, FSDPModule)]
    for module, following in pairwise(sharded):
        module.set_modules_to_forward_prefetch([following])
    fully_shard(network, mesh=mesh)


def _gather_cells(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a layer: its warehouse's cells, if it is the first of the pass to use them.

    Calling the warehouse gathers them. It also takes the layer's input through, so that its
    gradient tells when the layer, the last of the warehouse's in the backward pass, is done.
    """
    assert isinstance(layer, KWLayer)
    warehouse = layer.warehouse
    if isinstance(warehouse.cells, DTensor):
        x = warehouse(args[0])
        # A node left over from an earlier pass would run after the input's gradient is known.
        forget_anchor(warehouse.cells)
        return (x, *args[1:])
    return None


def _gather_again(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Before a layer's backward pass: its cells, if another backward pass has scattered them."""
    assert isinstance(layer, KWLayer)
    warehouse = layer.warehouse

    def gather(_: Tensor) -> None:
        if isinstance(warehouse.cells, DTensor) and isinstance(warehouse, FSDPModule):
            warehouse.unshard()

    if output.requires_grad:
        output.register_hook(gather)


def sharded_modules(network: nn.Module) -> list[FSDPModule]:
    """The modules that are sharded, the outermost first; none in a network that is not sharded."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def gather(network: nn.Module) -> None:
    """Before passes without backward, of which a process may have none: all parameters, which stay
    until :func:`release`; a collective call for a sharded network."""
    for module in sharded_modules(network):
        module.unshard()


def release(network: nn.Module) -> None:
    """After a forward pass without backward: each process keeps its part alone."""
    for module in sharded_modules(network):
        module.reshard()


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over sharded tensors as a plain tensor; a collective call for these."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(state: Any, keep: bool) -> Any:
    """A state with all sharded tensors whole, or ``None`` on a process that does not keep them; a
    collective call where there are any."""
    if isinstance(state, DTensor):
        # One at a time, off the device: together they may not fit there.
        whole = state.full_tensor().detach()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        values = (gathered(value, keep) for value in state)
        return tuple(values) if isinstance(state, tuple) else list(values)
    return state
