"""What PyTorch does not document and this project uses: all of it, in one place.

Each has a test in ``tests/test_torch_private.py``: the first to fail where a new version of
PyTorch changes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

BatchNorm = _BatchNorm
"""Base class of BatchNorm1d, 2d, 3d and SyncBatchNorm."""

BatchOrInstanceNorm = _NormBase
"""Base class of these and of InstanceNorm."""


# --- autograd ---------------------------------------------------------------------------------


def backward_pass() -> int:
    """The number of the backward pass that this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def runs_in_this_pass(node: Any) -> bool:
    """Whether the backward pass under way will run a node of the graph."""
    return bool(torch._C._will_engine_execute_node(node))


def in_function_transform() -> bool:
    """Whether code runs under ``torch.func.vmap``, ``grad`` and their like, or where tensors may
    carry derivatives forward (``torch.autograd.forward_ad``)."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether code is compiled, traced or transformed, so that plain operators have to be seen."""
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched()
    return compiled or in_function_transform()


def exports() -> bool:
    """Whether ``torch.export`` traces. ``torch.compiler.is_exporting`` of torch 2.9 is also true
    where ``torch.compile`` does."""
    return bool(torch.compiler._is_exporting_flag)


def is_watched() -> bool:
    """Whether ``make_fx``, ``FlopCounterMode`` or selective checkpointing sees operators, not what
    other code does; the last has to see the same ones again in the backward pass."""
    watching = ("TorchDispatchMode", "FlopCounterMode")  # ends of names
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__name__.endswith(watching) for mode in modes)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: neither on the meta device nor of ``FakeTensorMode``."""
    return not tensor.is_meta and type(tensor).__name__ != "FakeTensor"


# --- updates ----------------------------------------------------------------------------------


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``target.copy_(source)`` for all at once."""
    torch._foreach_copy_(targets, sources)


def overflow(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    """After ``scaler.unscale_(optimizer)``: whether gradients overflowed, and the scale."""
    scale = scaler._get_scale_async()
    assert scale is not None
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    total: Any = sum(each.to(scale.device) for each in found.values())
    return total > 0, scale


def step_unless(fault: Tensor, optimizer: Optimizer) -> None:
    """``optimizer.step()`` unless ``fault``, a boolean scalar; fused ones read it on the device."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not fault:  # not fused: the host has to know
            optimizer.step()
        return
    # What torch's GradScaler sets: fused kernels return at once if it is 1.
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, fault.float()
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def prepare_reduction(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Let DDP expect gradients of all parameters, as its forward pass does."""
    ddp.reducer.prepare_for_backward([])


# --- compilers and libraries ------------------------------------------------------------------


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Without what ``network.compile()`` made, which calls no hooks."""
    compiled = network._compiled_call_impl
    network._compiled_call_impl = None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled


def clear_compiled(limit: int | None = None) -> None:
    """Forget what ``torch.compile`` made; or let a function have ``limit`` compiled forms."""
    from torch._dynamo import config, reset

    if limit is None:
        reset()
    else:
        config.recompile_limit = limit


def trace_errors() -> type[Exception]:
    """What ``torch.export`` raises where it cannot prove a condition on sizes."""
    from torch._dynamo.exc import UserError

    return UserError


def scan(step: Callable[..., Any], start: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """A loop over first axes that an exporter keeps as one: the stacked second results of
    ``step(carry, slices) -> (carry, result)``."""
    from torch._higher_order_ops.scan import scan as torch_scan

    result: Tensor = torch_scan(step, start, values)[1]
    return result


def onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's ``a @ b`` of float32 on CPUs, for any strides; None where this build has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if linear is None else lambda a, b: linear(a, b.t(), None, "none", [], "")


# --- images -----------------------------------------------------------------------------------


_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def resize_bytes(image: Tensor, interpolation: str, out: Tensor) -> None:
    """``F.interpolate(image, out's size, mode=interpolation, antialias=True)`` into given memory.

    Args:
        image: uint8 ``[3, h, w]``.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``, which has no filter.
        out: uint8 ``[3, H, W]``, in any layout.
    """
    if interpolation == "nearest":
        out.copy_(F.interpolate(image[None], out.shape[1:], mode="nearest-exact")[0])
        return
    _RESIZE[interpolation](image[None], out.shape[1:], False, None, None, out=out[None])


def shared_bytes(count: int) -> Tensor:
    """uint8 ``[count]`` in memory that processes share, as a loader's collation allocates it."""
    storage = torch.UntypedStorage._new_shared(count, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)
