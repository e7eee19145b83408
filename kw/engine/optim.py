"""Optimizers, and mmengine's optimizer wrapper without its host synchronisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import ConfigError
from ..config.run_schema import OptimizerConfig
from ..models.weights import classifier_names
from ..registry import OPTIM_WRAPPERS
from ..warehouse import KWLayer
from .finite import FiniteGuard
from .parallel import placed_like, set_gradient_sync, whole_norm

__all__ = ["UpdateWrapper", "autocast", "build_optimizer"]

# BatchNorm, InstanceNorm, LayerNorm, GroupNorm, RMSNorm and what is derived from them.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """The context of forward and loss: autocast to bf16 or fp16, or none for fp32."""
    dtype = _DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def build_optimizer(
    network: nn.Module,
    config: OptimizerConfig,
    device: torch.device,
    lr_scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """AdamW or SGD with a group for what decays and one for what does not, for each rate.

    Args:
        network: the network whose parameters are trained; frozen ones are left out.
        config: the optimizer's settings.
        device: of the parameters; on CPU and CUDA the fused form is used: it makes no temporary
            copies of the parameters, and needs no synchronisation to skip an update. SGD of
            sharded parameters has none.
        lr_scales: factor on the learning rate by name of the parameter; 1 where there is none. A
            group's stands in its ``lr_scale``, which the schedule multiplies by.

    Raises:
        ConfigError: the classifier has a rate of its own, and the network does not say where it is.
    """
    branches = tuple(
        f"{prefix}.attention.".removeprefix(".")
        for prefix, module in network.named_modules()
        if isinstance(module, KWLayer)
    )
    heads = classifier_names(network)
    if config.head_lr != 1 and not heads:
        raise ConfigError(
            f"optimizer.head_lr = {config.head_lr:g}: the network does not say which module is its "
            "classifier; set 1"
        )
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        small = parameter.ndim <= 1 or name.endswith(".bias")
        exempt = {"norm_and_bias": small, "norm": name in norms, "none": False}
        scale = 1.0 if lr_scales is None else lr_scales.get(name, 1.0)
        if name.startswith(branches):
            scale *= config.attention_lr
        if name.startswith(heads):
            scale *= config.head_lr
        grouped.setdefault((scale, exempt[config.exempt_from_decay]), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if exempt else config.weight_decay,
            "lr_scale": scale,
        }
        # The schedule's own rate comes first, where there is one: it is the one that is logged.
        for (scale, exempt), parameters in sorted(
            grouped.items(), key=lambda item: (item[0][0] != 1, -item[0][0], item[0][1])
        )
    ]
    fused = True if device.type in ("cpu", "cuda") else None
    if config.name == "sgd" and any(isinstance(p, DTensor) for p in network.parameters()):
        fused = False  # torch has no fused SGD of sharded parameters
    if config.name == "adamw":
        beta1, beta2 = config.betas
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=fused
        )
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )


@OPTIM_WRAPPERS.register_module()
class UpdateWrapper(OptimWrapper):
    """Accumulation, clipping, autocast and loss scaling of one optimizer update.

    An update that is not finite has no effect (:class:`kw.engine.finite.FiniteGuard`).

    Gradients are reduced over processes in an update's last micro-step only. Nothing is read from
    the device: the gradient's norm stays a tensor in :attr:`grad_norm`.

    Args:
        optimizer: the optimizer.
        accumulation: micro-steps per update; each contributes the same share.
        clip_grad: largest global L2 norm of the gradient, or ``None``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (with dynamic loss scaling).
        device_type: where autocast applies.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulation: int = 1,
        clip_grad: float | None = None,
        precision: str = "fp32",
        device_type: str = "cpu",
    ) -> None:
        super().__init__(optimizer, accumulative_counts=accumulation)
        self.max_norm = clip_grad
        self.grad_norm: Tensor | None = None
        self.guard = FiniteGuard()
        self.precision = precision
        self.device_type = device_type
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "fp16")

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Start counting micro-steps at update ``init_counts`` of ``max_counts``."""
        self._inner_count = init_counts * self._accumulative_counts
        self._max_counts = max_counts * self._accumulative_counts
        self._remainder_counts = 0

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no gradient reduction in inner micro-steps."""
        if self._inner_count % self._accumulative_counts == 0:
            self.guard.begin(model)
        set_gradient_sync(model, self.should_sync())
        with super().optim_context(model), autocast(self.precision, self.device_type):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Back-propagate the scaled loss."""
        self.scaler.scale(self.guard.weigh(loss)).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Clip and update, if the gradient is finite."""
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = None
        if self.max_norm is not None or not scaled:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = whole_norm(nn.utils.get_total_norm(gradients))
        if self.max_norm is not None:
            assert norm is not None
            self.grad_norm = norm
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        self.guard.step(self.optimizer, self.scaler, None if scaled else norm, **kwargs)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, loss scaler and guard: tensors and plain types."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.guard.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.optimizer.load_state_dict(self._placed(state_dict["optimizer"]))
        if state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])
        if "skipped" in state_dict:  # checkpoints of earlier versions have none
            self.guard.load_state_dict(state_dict["skipped"])

    def _placed(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state, sharded as its parameters are, with this run's rates and decay."""
        pairs = list(zip(self.optimizer.param_groups, state["param_groups"], strict=True))
        parameters = {
            number: parameter
            for own, other in pairs
            for number, parameter in zip(other["params"], own["params"], strict=True)
        }
        groups = [{**own, "params": other["params"]} for own, other in pairs]
        placed = {
            number: {
                # Counts of steps are scalars, the same everywhere.
                name: placed_like(value, parameters[number]) if getattr(value, "ndim", 0) else value
                for name, value in values.items()
            }
            for number, values in state["state"].items()
        }
        return {**state, "state": placed, "param_groups": groups}
